"""Rebalancing under constant load: it comes to an end, keeps its bounds, and takes nothing back."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest

from services.controller.cluster_view.index import indexed
from services.controller.cluster_view.view import Policy, View
from services.controller.scaling.crowding import Shift
from services.controller.scaling.rebalancing import Rebalanced, RebalanceLimits, has_failed, rebalance
from stoker.ids import NodeId, ReplicaId
from tests.unit.services.controller.builders import (
    NOW_SECONDS,
    a_model,
    a_node,
    a_replica,
    a_reservation,
    a_view,
)

SEEDS = range(16)
LIMITS = RebalanceLimits(crowded_seconds=1.0, sessions_per_node=3, rest_seconds=20.0)
PLACES, BATCH = 4, 6
PASSES = 150


def cluster(counts: Mapping[str, int], *, nodes: int, order: Iterable[str] = (), **changes: object) -> View:
    """Replicas of one model with so many sessions each, dealt out over the nodes."""
    placed: dict[str, list[str]] = {f"n{number}": [] for number in range(nodes)}
    for number, name in enumerate(sorted(counts)):
        placed[f"n{number % nodes}"].append(name)
    names = list(order) or list(counts)
    return a_view(
        models=(a_model(concurrency=PLACES, max_replicas=len(counts)),),
        nodes=tuple(
            a_node(
                node_id,
                devices=len(counts),
                replicas=tuple(
                    a_replica(
                        name,
                        devices=(slot,),
                        sessions=counts[name],
                        waiting_sessions=max(0, counts[name] - BATCH),
                        idle_since_seconds=None,
                        context_tokens=100 * counts[name],
                        max_batch=BATCH,
                        **changes,
                    )
                    for slot, name in enumerate(mine)
                ),
            )
            for node_id, mine in placed.items()
        ),
        reservations=tuple(
            a_reservation(name, node_id=node_id, devices=(placed[node_id].index(name),))
            for name in names
            for node_id in placed
            if name in placed[node_id]
        ),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_under_constant_load_moves_end_even_out_and_stay_within_their_bounds(seed: int) -> None:
    draw = random.Random(seed)
    nodes = draw.randint(1, 4)
    counts = {f"r{number}": draw.randint(0, 14) for number in range(draw.randint(2, 6))}
    total, unevenness = sum(counts.values()), sum(count**2 for count in counts.values())
    state, last = Rebalanced(), 0
    view = indexed(cluster(counts, nodes=nodes))
    arrive: dict[int, list[Shift]] = {}
    directions: dict[str, tuple[str, int]] = {}
    for second in range(PASSES):
        for shift in arrive.pop(second, []):
            counts[shift.replica_id] -= shift.sessions
            counts[shift.to_replica_id] += shift.sessions
            now_uneven = sum(count**2 for count in counts.values())
            assert now_uneven <= unevenness, "a move made it worse"
            unevenness = now_uneven
            view = indexed(cluster(counts, nodes=nodes))
        state = rebalance(view, state, NOW_SECONDS + second, Policy(), LIMITS)
        for shift in state.shifts:
            last = second
            arrive.setdefault(second + draw.randint(1, 3), []).append(shift)
            for replica_id, way in ((shift.replica_id, "gave"), (shift.to_replica_id, "took")):
                before, at = directions.get(replica_id, (way, 0))
                assert before == way or second - at >= LIMITS.rest_seconds, (
                    f"{replica_id} {before}, now {way}"
                )
                directions[replica_id] = way, second
        on_their_way = Counter[NodeId]()
        for each in state.under_way:
            on_their_way.update(
                {each.shift.node_id: each.shift.sessions}
                if each.shift.node_id == each.shift.to_node_id
                else dict.fromkeys((each.shift.node_id, each.shift.to_node_id), each.shift.sessions)
            )
        assert not on_their_way or max(on_their_way.values()) <= LIMITS.sessions_per_node

    assert last < PASSES - 60, "it does not come to rest"
    assert sum(counts.values()) == total
    if total <= PLACES * len(counts):
        assert max(counts.values()) <= PLACES, counts  # there was room for everybody


@pytest.mark.parametrize("seed", SEEDS[:10])
def test_what_is_decided_does_not_depend_on_the_order_of_what_is_known(seed: int) -> None:
    draw = random.Random(seed)
    counts = {f"r{number}": draw.randint(0, 14) for number in range(5)}
    shuffled = list(counts)
    draw.shuffle(shuffled)

    def decided(order: Iterable[str]) -> tuple[Shift, ...]:
        view = cluster(counts, nodes=2, order=order)
        before = Rebalanced()
        for second in range(3):
            before = rebalance(view, before, NOW_SECONDS + second, Policy(), LIMITS)
        return tuple(each.shift for each in before.under_way)

    assert decided(shuffled) == decided(sorted(counts))


def test_sessions_stay_where_no_other_replica_computes_the_same_bits() -> None:
    crowded = cluster({"r0": 9, "r1": 0}, nodes=2)
    other = cluster({"r0": 9, "r1": 0}, nodes=2, numerics="other")
    mixed = a_view(
        models=tuple(crowded.models.values()),
        nodes=(crowded.nodes[NodeId("n0")], other.nodes[NodeId("n1")]),
        reservations=tuple(crowded.reservations.values()),
    )

    assert _after_a_while(crowded).under_way
    assert not _after_a_while(mixed).under_way


@pytest.mark.parametrize(("there", "moved"), [(0, 2), (2, 1), (3, 0)])
def test_of_sessions_that_wait_below_the_target_so_many_go_as_leave_no_more_there_than_here(
    there: int, moved: int
) -> None:
    """They wait for memory, say; the others' counts are within the target."""
    view = cluster({"r0": PLACES, "r1": there}, nodes=2)
    node = view.nodes[NodeId("n0")]
    waiting = replace(
        node.replicas[ReplicaId("r0")], waiting_sessions=3, waiting_since_seconds=NOW_SECONDS - 1
    )
    view = replace(
        view, nodes={**view.nodes, node.node_id: replace(node, replicas={ReplicaId("r0"): waiting})}
    )

    assert sum(each.shift.sessions for each in _after_a_while(view).under_way) == moved


def test_a_source_whose_order_failed_rests() -> None:
    crowded = cluster({"r0": 9, "r1": 0}, nodes=2)
    state = _after_a_while(crowded)
    (ordered,) = state.under_way

    now_seconds = NOW_SECONDS + 2
    state = has_failed(state, ordered.shift, now_seconds, LIMITS)

    for second in range(1, 20):
        state = rebalance(crowded, state, now_seconds + second, Policy(), LIMITS)
        assert not state.under_way
    state = rebalance(crowded, state, now_seconds + 20, Policy(), LIMITS)
    assert [each.shift.replica_id for each in state.under_way] == [ReplicaId("r0")]


def _after_a_while(view: View) -> Rebalanced:
    state = Rebalanced()
    for second in range(3):
        state = rebalance(view, state, NOW_SECONDS + second, Policy(), LIMITS)
    return state
