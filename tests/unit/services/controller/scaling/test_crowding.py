"""How many sessions of a crowded replica go where, and where none do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from services.controller.cluster_view.index import indexed
from services.controller.cluster_view.view import Policy, Scheduling, View
from services.controller.scaling.crowding import Bounds, Shift, crowded, shifts
from stoker.ids import NodeId, ReplicaId, Revision
from tests.unit.services.controller.builders import (
    NOW_SECONDS,
    a_model,
    a_node,
    a_replica,
    a_reservation,
    a_view,
)

PLACES = 4
BOUNDS = Bounds(
    crowded_seconds=0.0,
    hysteresis_ratio=1.0,
    sessions_per_node=100,
    busy=frozenset(),
    give_not=frozenset(),
    take_not=frozenset(),
    on_their_way={},
    most=16,
)


def pairs(counts: Sequence[tuple[int, int]], *, here: Any = None, there: Any = None) -> View:
    """A crowded replica and another one of the same model, on a node each; `there` changes the other one."""
    models, nodes, reservations = [], [], []
    for number, both in enumerate(counts):
        name = f"m{number}"
        models.append(a_model(name, concurrency=PLACES, max_replicas=2))
        for place, sessions, changes in zip(("a", "b"), both, (here, there), strict=True):
            found = a_replica(f"{name}.{place}", name, sessions=sessions, idle_since_seconds=None)
            node_id = f"{place}{number}"
            nodes.append(a_node(node_id, replicas=(replace(found, **changes or {}),)))
            reservations.append(a_reservation(f"{name}.{place}", name, node_id))
    return a_view(models=tuple(models), nodes=tuple(nodes), reservations=tuple(reservations))


def shifted(view: View, **bounds: Any) -> tuple[Shift, ...]:
    """What moves of crowds that have lasted for long."""
    view = indexed(view)
    crowds = crowded(view)
    since = {crowd.replica.replica_id: 0.0 for crowd in crowds}
    return shifts(view, crowds, since, NOW_SECONDS, Policy(), replace(BOUNDS, **bounds))


@pytest.mark.parametrize(("here", "there", "moved"), [(6, 0, 2), (12, 3, 1), (12, 0, 4), (5, 4, 0)])
def test_as_many_go_as_are_too_many_here_and_have_a_place_there(here: int, there: int, moved: int) -> None:
    assert sum(shift.sessions for shift in shifted(pairs([(here, there)]))) == moved


def test_a_session_that_stays_on_its_node_counts_twice_on_its_way() -> None:
    view = pairs([(12, 0)])
    on_one = a_node(
        "a0",
        devices=2,
        replicas=tuple(each for node in view.nodes.values() for each in node.replicas.values()),
    )
    moved = view.reservations[ReplicaId("m0.b")]
    view = replace(
        view,
        nodes={on_one.node_id: on_one},
        reservations={
            **view.reservations,
            moved.replica_id: replace(moved, node_id=on_one.node_id, devices=(1,)),
        },
    )

    assert [shift.sessions for shift in shifted(view, sessions_per_node=3)] == [1]
    assert [shift.sessions for shift in shifted(view, sessions_per_node=4)] == [2]


def test_no_more_shifts_than_allowed_are_begun_at_a_time() -> None:
    assert len(shifted(pairs([(6, 0)] * 5), most=3)) == 3


@pytest.mark.parametrize(
    "there",
    [
        {"waiting_sessions": 1},
        {"loading": True},
        {"revision": Revision("r2")},
        {"numerics": "other"},
        {"max_context_tokens": 100},
        {"max_batch": 1, "sessions": 1},
    ],
    ids=str,
)
def test_none_go_to_a_replica_where_they_would_wait_or_not_go_on_alike(there: dict[str, object]) -> None:
    here = {"revision": Revision("r1"), "numerics": "one", "max_context_tokens": 200}
    alike = pairs([(6, 1)], here=here, there=here)

    assert [shift.sessions for shift in shifted(alike)] == [2]
    assert shifted(pairs([(6, 1)], here=here, there={**here, **there})) == ()


@pytest.mark.parametrize("why", ["stale", "moving", "distrusted", "silent", "cordoned", "gave lately"])
def test_none_go_to_a_replica_that_will_not_stay_or_must_not_take_any(why: str) -> None:
    view, other, node_id = pairs([(6, 0)]), ReplicaId("m0.b"), NodeId("b0")
    reservation, node = view.reservations[other], view.nodes[node_id]
    bounds = {}
    match why:
        case "stale":
            view = replace(
                view, reservations={**view.reservations, other: replace(reservation, runtime="v0")}
            )
        case "moving":
            going = replace(reservation, moving_to=ReplicaId("elsewhere"))
            view = replace(view, reservations={**view.reservations, other: going})
        case "distrusted":
            view = replace(view, distrusted=frozenset({other}))
        case "silent":
            view = replace(view, nodes={**view.nodes, node_id: replace(node, connected=False)})
        case "cordoned":
            view = replace(view, scheduling={node_id: Scheduling.CORDONED})
        case _:
            bounds = {"take_not": frozenset({other})}

    assert shifted(view, **bounds) == ()
