"""Which node is cleared for a model that is likely to be asked for, and what is no reason to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from services.controller.cluster_view.forecast import arrived
from services.controller.cluster_view.index import indexed
from services.controller.cluster_view.learnt import Arrivals
from services.controller.cluster_view.view import Held, Node, Policy, Stage, View
from services.controller.scaling.clearing import Clearing, Terms, clear_a_node
from services.controller.scaling.rebalancing import PATCHES_SECONDS, Rebalanced, RebalanceLimits, rebalance
from stoker.ids import ModelName, ReplicaId
from stoker.units import GB, MB
from tests.unit.services.controller.builders import (
    NOW_SECONDS,
    a_model,
    a_node,
    a_replica,
    a_reservation,
    a_view,
)

POLICY = Policy(may_migrate=True)
TERMS = Terms(
    hysteresis_ratio=1.0, rest_seconds=60.0, horizon_seconds=300.0, least_likelihood=0.3, most_moves=4
)
LIMITS = RebalanceLimits(hysteresis_ratio=1.0, rest_seconds=60.0)


def likely() -> Arrivals:
    """A model that is asked for every minute."""
    found = None
    for number in range(12, 0, -1):
        found = arrived(found, NOW_SECONDS - 60.0 * number)
    assert found is not None
    return found


def patchy(*large: str, large_devices: int = 2, nodes: tuple[Node, ...] = (), **changes: Any) -> View:
    """Two nodes of two devices, a stream on each; likely models that want both devices of one."""
    streaming = {"sessions": 1, "idle_since_seconds": None, "context_tokens": 100} | changes
    return indexed(
        a_view(
            models=(
                a_model("s"),
                a_model("t"),
                *(a_model(name, devices=large_devices, keep_alive_seconds=0.0) for name in large),
            ),
            nodes=(
                a_node("a", devices=2, replicas=(a_replica("s1", "s", **streaming),)),
                a_node("b", devices=2, replicas=(a_replica("t1", "t", **streaming),)),
                *nodes,
            ),
            reservations=(a_reservation("s1", "s", "a"), a_reservation("t1", "t", "b")),
            arrivals=dict.fromkeys(map(ModelName, large), likely()),
        )
    )


def cleared(view: View, **terms: Any) -> Clearing | None:
    return clear_a_node(view, (), NOW_SECONDS, POLICY, replace(TERMS, **terms))[0]


def test_a_node_whose_other_device_is_free_is_cleared_by_moving_who_streams_there() -> None:
    found = cleared(patchy("large"))

    assert found is not None
    (move,) = found.moves
    assert (found.node_id, move.replica_id, move.to_node_id, move.to_devices) == ("a", "s1", "b", (1,))


def test_no_more_replicas_move_than_allowed() -> None:
    assert cleared(patchy("large"), most_moves=0) is None


def test_what_has_just_become_ready_is_not_moved() -> None:
    assert cleared(patchy("large", ready_since_seconds=NOW_SECONDS - 59)) is None
    assert cleared(patchy("large", ready_since_seconds=NOW_SECONDS - 61)) is not None
    assert cleared(patchy("large", ready_since_seconds=NOW_SECONDS - 59, has_served=True)) is None


def test_a_node_is_not_cleared_for_its_locality_while_another_one_has_room() -> None:
    """A request that waited would have the stream moved: the other node's disk takes a quarter of an hour."""
    slow = a_node("c", devices=2, stages={"disk": Stage(bytes_per_second=1 * MB)})
    view = patchy("large", nodes=(slow,))
    has_it = replace(
        view.nodes["a"], held={view.models["large"].checkpoint: Held(dram_bytes=GB, disk_bytes=GB)}
    )

    assert cleared(indexed(replace(view, nodes={**view.nodes, "a": has_it}, index=None))) is None


def test_nothing_idle_is_stopped_for_a_request_that_has_not_come() -> None:
    three = tuple(
        a_node(name, devices=3, replicas=replicas)
        for name, replicas in (
            ("a", (a_replica("s1", "s", sessions=1, idle_since_seconds=None), a_replica("s2", "s"))),
            ("b", (a_replica("t1", "t", sessions=1, idle_since_seconds=None), a_replica("t2", "t"))),
        )
    )
    view = patchy("large", large_devices=3)
    reservations = {
        **view.reservations,
        ReplicaId("s2"): replace(a_reservation("s2", "s", "a"), devices=(1,)),
        ReplicaId("t2"): replace(a_reservation("t2", "t", "b"), devices=(1,)),
    }
    view = replace(view, nodes={node.node_id: node for node in three}, reservations=reservations, index=None)

    assert cleared(indexed(view)) is None


def test_two_models_are_looked_at_and_the_next_ones_later() -> None:
    view = patchy("w", "x", "y", large_devices=9)

    assert clear_a_node(view, (), NOW_SECONDS, POLICY, TERMS) == (None, ("w", "x"))


def test_who_is_looked_at_in_vain_lets_the_others_come_first() -> None:
    view = patchy("large", "w", "x")
    hopeless = {
        name: replace(view.models[name], devices=9, file_bytes=2 * GB) for name in map(ModelName, "wx")
    }
    view = indexed(replace(view, models={**view.models, **hopeless}, index=None))

    first = rebalance(view, Rebalanced(), NOW_SECONDS, POLICY, LIMITS)
    second = rebalance(view, first, NOW_SECONDS + PATCHES_SECONDS, POLICY, LIMITS)

    assert first.clearing is None
    assert second.clearing is not None
    assert second.clearing.model == "large"


def test_one_node_is_cleared_at_a_time_and_for_nobody_twice_before_a_rest() -> None:
    view = patchy("large", "other")
    state, began = Rebalanced(), {}
    for second in range(int(LIMITS.rest_seconds)):
        state = rebalance(view, state, NOW_SECONDS + second, POLICY, LIMITS)
        if state.clearing is not None:
            began.setdefault(state.clearing.model, []).append((second, state.clearing.seconds))

    ((first, took_seconds),), ((second, _),) = began.values()
    assert first == 0
    assert second > took_seconds


def test_a_node_is_cleared_for_nobody_where_nothing_may_move() -> None:
    assert clear_a_node(patchy("large"), (), NOW_SECONDS, Policy(may_migrate=False), TERMS) == (None, ())
