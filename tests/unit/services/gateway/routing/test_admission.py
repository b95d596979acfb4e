"""A model's queue in one gateway is bounded."""

from __future__ import annotations

import pytest

from services.gateway.routing.admission import Admission
from stoker.errors import QueueFull
from stoker.ids import ModelName
from tests.unit.services.gateway.builders import replica, route


def test_a_cold_model_takes_as_many_as_its_queue_holds() -> None:
    admission, cold = Admission(), route(replicas=(), max_queue=2)
    admission.enter(cold, 2)

    with pytest.raises(QueueFull) as caught:
        admission.enter(cold, 1)
    assert caught.value.retry_after_seconds


def test_a_warm_model_takes_its_batch_besides() -> None:
    admission, warm = Admission(), route(replicas=(replica(max_batch=4),), max_queue=2)
    admission.enter(warm, 6)

    with pytest.raises(QueueFull):
        admission.enter(warm, 1)


def test_what_is_left_makes_room() -> None:
    admission, cold = Admission(), route(replicas=(), max_queue=2)
    admission.enter(cold, 2)
    admission.leave(ModelName("tiny"), 2)
    admission.enter(cold, 1)

    assert admission.sessions == 1


def test_models_do_not_share_a_queue() -> None:
    admission = Admission()
    admission.enter(route("a", replicas=(), max_queue=1), 1)
    admission.enter(route("b", replicas=(), max_queue=1), 1)

    assert admission.sessions == 2


def test_a_refused_request_takes_nothing() -> None:
    admission, cold = Admission(), route(replicas=(), max_queue=2)
    with pytest.raises(QueueFull):
        admission.enter(cold, 3)

    assert admission.sessions == 0
