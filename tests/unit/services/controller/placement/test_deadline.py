"""Which requests a deadline refuses at once."""

from __future__ import annotations

from services.controller.answer import answer
from services.controller.cluster_view.demand import Demand
from services.controller.cluster_view.view import Phase, Policy, View
from services.controller.placement.deadline import Late, late, late_if_started
from stoker.ids import ModelName
from tests.unit.services.controller.builders import (
    NOW_SECONDS,
    a_model,
    a_node,
    a_replica,
    a_reservation,
    a_view,
)

NAME = ModelName("m")


def declined(view: View, in_seconds: float) -> Late | None:
    found = answer(view, NAME, since_seconds=NOW_SECONDS, now_seconds=NOW_SECONDS)
    due_seconds = NOW_SECONDS + in_seconds
    return late(found, now_seconds=NOW_SECONDS, due_seconds=due_seconds) or late_if_started(
        view, NAME, found, now_seconds=NOW_SECONDS, due_seconds=due_seconds, policy=Policy()
    )


def test_the_best_of_all_starts_is_what_a_deadline_is_compared_with() -> None:
    slow = a_node("slow", stages={})
    view = a_view(models=(a_model(file_bytes=5_000_000_000),), nodes=(slow, a_node("fast")))

    found = declined(view, 4.0)

    assert found is not None
    assert 5.0 <= found.ready_seconds < 5.5
    assert (found.ordered, found.tier) == (False, "disk")
    assert declined(view, 6.0) is None


def test_a_model_that_is_ready_meets_every_deadline() -> None:
    view = a_view(
        models=(a_model(),), nodes=(a_node(replicas=(a_replica(),)),), reservations=(a_reservation(),)
    )

    assert declined(view, 0.001) is None


def test_a_start_on_its_way_is_judged_by_what_is_left_of_it() -> None:
    starting = a_replica(phase=Phase.STARTING, idle_since_seconds=None)
    begun = a_reservation(seen_seconds=NOW_SECONDS - 7, predicted_seconds=10.0)
    view = a_view(models=(a_model(),), nodes=(a_node(replicas=(starting,)),), reservations=(begun,))

    assert declined(view, 2.0) == Late(ready_seconds=3.0, ordered=True)
    assert declined(view, 4.0) is None


def test_without_room_or_nodes_nobody_knows_so_nobody_is_refused() -> None:
    other = a_replica("o", "other", sessions=1, idle_since_seconds=None)
    full = a_view(
        models=(a_model(), a_model("other")),
        nodes=(a_node(replicas=(other,)),),
        reservations=(a_reservation("o", "other"),),
    )

    assert declined(full, 0.01) is None
    assert declined(a_view(models=(a_model(),)), 0.01) is None


def test_who_waits_with_others_whose_start_is_being_decided_is_not_refused() -> None:
    waiting = {NAME: Demand(since_seconds=NOW_SECONDS, waiters=1)}
    view = a_view(models=(a_model(),), nodes=(a_node(),), demands=waiting)

    assert declined(view, 0.01) is None
