"""What an operator's move does: which replica goes, where it joins or begins anew, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.controller.cluster_view.index import indexed
from services.controller.cluster_view.view import Phase, Policy, Replica, Scheduling, View
from services.controller.scaling.actions import Start
from services.controller.scaling.operator_moves import Begin, Join, operator_move, place_for_request
from stoker.errors import AlreadyExists, CapacityError, InUse, NotFound, StokerError
from stoker.ids import ModelName, NodeId, ReplicaId
from tests.unit.services.controller.builders import (
    NOW_SECONDS,
    a_model,
    a_node,
    a_replica,
    a_reservation,
    a_view,
)


def busy(replica_id: str, sessions: int = 1, **changes: Any) -> Replica:
    return a_replica(replica_id, sessions=sessions, idle_since_seconds=None, **changes)


def view(
    *, there: tuple[Replica, ...] = (), here: tuple[Replica, ...] = (busy("r-1"),), **changes: Any
) -> View:
    """Replicas of one model here, on node a, and there, on node b."""
    on = {"a": here, "b": there}
    return indexed(
        a_view(
            models=(a_model(),),
            nodes=tuple(a_node(node_id, replicas=replicas) for node_id, replicas in on.items()),
            reservations=tuple(
                a_reservation(replica.replica_id, replica.model, node_id)
                for node_id, replicas in on.items()
                for replica in replicas
            ),
            **changes,
        )
    )


def move(found: View, to: str = "b") -> Join | Begin:
    return operator_move(found, ModelName("m"), NodeId(to), NOW_SECONDS, Policy())


def test_a_model_begins_anew_on_free_slots_and_its_sessions_follow() -> None:
    decided = move(view())

    assert isinstance(decided, Begin)
    assert (decided.move.replica_id, decided.move.node_id, decided.move.to_node_id) == ("r-1", "a", "b")
    assert decided.move.to_devices == (0,)
    assert decided.move.for_model is None


@pytest.mark.parametrize("phase", [Phase.READY, Phase.STARTING])
def test_sessions_join_a_replica_that_is_there_or_on_its_way(phase: Phase) -> None:
    decided = move(view(there=(a_replica("r-2", phase=phase),)))

    assert isinstance(decided, Join)
    assert (decided.source.reservation.replica_id, decided.to) == ("r-1", "r-2")


def test_the_busiest_replica_goes() -> None:
    decided = move(view(here=(busy("r-1", 1), busy("r-2", 5), busy("r-3", 2))))

    assert decided.source.reservation.replica_id == "r-2"


@pytest.mark.parametrize(
    ("found", "error", "words"),
    [
        (view(here=()), NotFound, "runs nowhere"),
        (view(here=(), there=(busy("r-2"),)), AlreadyExists, "runs on b already"),
        (view(there=(busy("o", model="other"),)), CapacityError, "no free slots"),
        (view(scheduling={NodeId("b"): Scheduling.DRAINED}), InUse, "drained"),
    ],
)
def test_what_cannot_move_is_refused_with_the_reason(
    found: View, error: type[StokerError], words: str
) -> None:
    with pytest.raises(error, match=words):
        move(found)


def test_a_node_that_nobody_knows_is_named_beside_those_that_are_there() -> None:
    with pytest.raises(NotFound, match="'c' has not joined; there are: a, b"):
        move(view(), to="c")


def test_a_replica_that_is_moving_is_left_alone() -> None:
    found = view()
    moving = a_reservation("r-1", moving_to=ReplicaId("r-9"))

    with pytest.raises(InUse, match="moving to r-9 already"):
        move(a_view(models=(a_model(),), nodes=tuple(found.nodes.values()), reservations=(moving,)))


def place(found: View, to: str = "b") -> ReplicaId | Start:
    return place_for_request(found, ModelName("m"), NodeId(to), NOW_SECONDS, Policy())


def with_at_most(found: View, replicas: int) -> View:
    models = {name: replace(model, max_replicas=replicas) for name, model in found.models.items()}
    return indexed(replace(found, models=models))


def test_one_request_has_its_model_started_where_it_goes() -> None:
    decided = place(with_at_most(view(), 2))

    assert isinstance(decided, Start)
    assert (decided.model, decided.node_id, decided.devices) == ("m", "b", (0,))


@pytest.mark.parametrize("phase", [Phase.READY, Phase.STARTING])
def test_one_request_goes_to_a_replica_that_is_there_or_on_its_way(phase: Phase) -> None:
    assert place(view(there=(a_replica("r-2", phase=phase),))) == "r-2"


@pytest.mark.parametrize(
    ("found", "error", "words"),
    [
        (view(), InUse, "at most 1 elsewhere"),
        (with_at_most(view(there=(busy("o", model="other"),)), 2), CapacityError, "no free slots"),
        (with_at_most(view(scheduling={NodeId("b"): Scheduling.DRAINED}), 2), InUse, "drained"),
    ],
)
def test_one_request_whose_model_cannot_start_there_stays(
    found: View, error: type[StokerError], words: str
) -> None:
    with pytest.raises(error, match=words):
        place(found)
