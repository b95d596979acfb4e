"""The search finds what a look at every node finds, and victims are chosen as brute force would."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import inf
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.cluster_view.events import (
    Demanded,
    LoadReported,
    NodeDisconnected,
    NodeReported,
    Reserved,
    StopOrdered,
)
from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.traits import worth_seconds
from services.controller.cluster_view.view import Device, Held, Model, Node, Policy, Pool, Stage, View
from services.controller.placement.bounds import NOBODY_IS_DEAR, Bounds
from services.controller.placement.destinations import Destinations
from services.controller.placement.options import rank
from services.controller.placement.place import Migrate, Placed, StopIdle, Unplaceable, Wait, place
from services.controller.placement.room import enough, never_fits, situation_of
from services.controller.placement.search import search
from services.controller.placement.victims import idle_may_go
from stoker.ids import ModelName, NodeId
from stoker.units import GB
from tests.unit.services.controller.builders import NOW_SECONDS, a_model, a_replica, a_reservation, a_view

MODELS = tuple(f"m{index}" for index in range(6))
POLICY = Policy()
MOVING = Policy(may_migrate=True, hysteresis_ratio=1.5)
RATES = st.sampled_from((0.5, 1.0, 1.0, 2.0, 3.7))


@st.composite
def models(draw: st.DrawFn) -> tuple[Model, ...]:
    return tuple(
        a_model(
            name,
            file_bytes=draw(st.sampled_from((1, 4, 16))) * GB,
            origin=draw(st.sampled_from(("disk", "remote"))),
            devices=draw(st.sampled_from((1, 1, 2, 3))),
            pinned=draw(st.integers(0, 9)) == 0,
            required_labels=frozenset({("zone", "x")} if draw(st.integers(0, 7)) == 0 else ()),
            preferred_labels=frozenset({("disk", "fast")} if draw(st.integers(0, 4)) == 0 else ()),
            min_replicas=draw(st.sampled_from((0, 0, 0, 1))),
            max_replicas=9,
        )
        for name in MODELS
    )


@st.composite
def views(draw: st.DrawFn) -> View:
    deployed = draw(models())
    by_name = {model.name: model for model in deployed}
    nodes, reservations = [], []
    for number in range(draw(st.integers(1, 5))):
        node_id = f"n{number}"
        slots = draw(st.integers(1, 4))
        replicas, device = [], 0
        while device < slots:
            model = by_name[ModelName(draw(st.sampled_from(MODELS)))]
            count = min(model.devices, slots - device)
            taken = tuple(range(device, device + count))
            device += count
            what = draw(st.sampled_from(("free", "idle", "busy")))
            if what == "free":
                continue
            replica_id = f"{node_id}-{taken[0]}"
            busy = what == "busy"
            replicas.append(
                a_replica(
                    replica_id,
                    model.name,
                    devices=taken,
                    sessions=1 if busy else 0,
                    context_tokens=draw(st.sampled_from((10, 500, 3000))) if busy else 0,
                    idle_since_seconds=None if busy else NOW_SECONDS - draw(st.sampled_from((1, 30, 200))),
                )
            )
            reservations.append(a_reservation(replica_id, model.name, node_id, devices=taken))
        held = {
            model.checkpoint: Held(
                dram_bytes=draw(st.sampled_from((0, model.file_bytes))),
                disk_bytes=draw(st.sampled_from((0, model.file_bytes))),
                leases=0,
            )
            for model in deployed
            if draw(st.integers(0, 3)) == 0
        }
        stages = {
            stage: Stage(
                bytes_per_second=draw(RATES) * GB, queued_bytes=draw(st.sampled_from((0, 0, 0, 5))) * GB
            )
            for stage in ("disk", "remote", "peer", "device")
        }
        nodes.append(
            Node(
                node_id=NodeId(node_id),
                devices=tuple(Device(index=i, kind="cuda", memory_bytes=80 * GB) for i in range(slots)),
                replicas={replica.replica_id: replica for replica in replicas},
                held=held,
                stages=stages,
                opening={tier: draw(st.sampled_from((0.0, 0.3, 2.0))) for tier in ("remote", "peer")},
                pool=Pool(total_bytes=draw(st.sampled_from((0, 20, 100))) * GB),
                warm_workers=draw(st.integers(0, 1)),
                worker_start_seconds=draw(st.sampled_from((3.0, 6.0))),
                labels=frozenset(label for label in (("zone", "x"), ("disk", "fast")) if draw(st.booleans())),
                last_seen_seconds=NOW_SECONDS,
            )
        )
    return a_view(models=deployed, nodes=tuple(nodes), reservations=tuple(reservations))


def choice(decision: Any) -> Any:
    """Return a decision without the options it was chosen from: the search looks at fewer."""
    match decision:
        case Placed() | StopIdle() | Migrate():
            return replace(decision, options=())
        case Wait() | Unplaceable():
            return decision


@given(views(), st.sampled_from(MODELS))
@settings(max_examples=40, deadline=None)
def test_no_start_elsewhere_is_quicker_than_its_floor(view: View, name: str) -> None:
    destinations = Destinations(situation_of(view, ModelName(MODELS[0]), NOW_SECONDS, MOVING))

    floor_seconds, least_seconds = (
        look(ModelName(name)) for look in (destinations.floor_seconds, destinations.least_seconds)
    )

    if floor_seconds is None:
        assert least_seconds is None
    elif least_seconds is not None:
        assert floor_seconds <= least_seconds


@settings(max_examples=40, deadline=None)
@given(views(), st.sampled_from(MODELS), st.booleans(), st.booleans())
def test_the_search_chooses_what_a_look_at_every_node_chooses(
    view: View, name: str, moving: object, late: object
) -> None:
    policy = MOVING if moving else POLICY
    since_seconds = NOW_SECONDS - (100 if late else 0)
    view = fold(view, Demanded(model=ModelName(name), now_seconds=since_seconds))

    searched = place(view, ModelName(name), NOW_SECONDS, policy)
    scanned = place(view, ModelName(name), NOW_SECONDS, policy, exhaustive=True)

    assert choice(searched) == choice(scanned)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from((1.0, 2.0)), st.integers(0, 2)), min_size=1, max_size=24))
def test_among_nodes_that_tie_the_search_chooses_what_a_look_at_every_node_chooses(
    drawn: list[tuple[float, int]],
) -> None:
    """Nodes of two rates, some full, some with a start under way: most of them are equal."""
    nodes = tuple(alike(f"n{index:02}", rate, slots) for index, (rate, slots) in enumerate(drawn))
    started = a_reservation("s", "m1", "n00", devices=(0,)) if drawn[0][1] else None
    view = a_view(
        models=(a_model("m0", max_replicas=9), a_model("m1", max_replicas=9)),
        nodes=nodes,
        reservations=(started,) if started else (),
    )

    searched = place(view, ModelName("m0"), NOW_SECONDS, POLICY)
    scanned = place(view, ModelName("m0"), NOW_SECONDS, POLICY, exhaustive=True)

    assert choice(searched) == choice(scanned)


DRAWN = st.lists(
    st.tuples(st.sampled_from((0.8, 1.0, 1.3)), st.floats(3, 250), st.sampled_from("insnb")),
    min_size=8,
    max_size=40,
)
"""Of full nodes the rate in GB/s, for how long their replica is idle, and what it is: idle, new, busy,
or new but has served."""


@settings(max_examples=15, deadline=None)
@given(DRAWN, st.integers(0, 9))
def test_of_many_full_nodes_the_search_chooses_what_a_look_at_every_node_chooses(
    drawn: list[tuple[float, float, str]], free: int
) -> None:
    """Some of the idle replicas may not go yet, so that a bound is not held; one slot may be free."""
    view = full(drawn, free=free)

    searched = place(view, ModelName("m0"), NOW_SECONDS, POLICY)
    scanned = place(view, ModelName("m0"), NOW_SECONDS, POLICY, exhaustive=True)

    assert choice(searched) == choice(scanned)


@settings(max_examples=15, deadline=None)
@given(DRAWN, st.floats(4, 12), st.booleans())
def test_only_nodes_that_cost_more_are_put_aside(
    drawn: list[tuple[float, float, str]], most_seconds: float, on_slow_devices: object
) -> None:
    view = full(drawn, device_gigabytes=0.9 if on_slow_devices else 0.0)
    situation = situation_of(view, ModelName("m0"), NOW_SECONDS, POLICY)
    bounds, by_worth = Bounds(situation, situation.wanted, may_disturb=True), situation.index.idle_by_worth
    aside: list[NodeId] = []

    for place_of, row in enumerate(by_worth):
        slower = list(by_worth)[place_of:]
        fastest = max(situation.index.summaries[node_id].rates[0] for _, node_id in slower)
        dear = bounds.dear_idle(fastest, row[0], most_seconds)
        bounds.idle_on((row,), set(), dear, aside, inf)
    found = bounds.idle_on([(0.0, node_id) for node_id in aside], set(), NOBODY_IS_DEAR, [], inf)

    assert all(rank[4] > most_seconds for rank, _ in found)


def full(drawn: list[tuple[float, float, str]], *, free: int = 0, device_gigabytes: float = 0.0) -> View:
    """Return a cluster of such nodes; `free` names one with a free slot, from 1 on; devices or CPUs."""
    nodes, reservations = [], []
    for number, (rate, idle_seconds, what) in enumerate(drawn):
        node, replica_id = alike(f"n{number:02}", rate + number / 1000, 1), f"r{number:02}"
        replica = a_replica(
            replica_id,
            f"m{1 + number % 5}",
            sessions=1 if what == "b" else 0,
            idle_since_seconds=None if what == "b" else NOW_SECONDS - idle_seconds,
            ready_since_seconds=NOW_SECONDS - (1 if what in "ns" else 500),
            has_served=what == "s",
        )
        if number == free - 1:
            nodes.append(node)
            continue
        if device_gigabytes:
            slot = Device(index=0, kind="cuda", memory_bytes=80 * GB)
            stages = {**node.stages, "device": Stage(bytes_per_second=device_gigabytes * GB)}
            node = replace(node, devices=(slot,), stages=stages)
        nodes.append(replace(node, replicas={replica.replica_id: replica}))
        reservations.append(a_reservation(replica_id, replica.model, node.node_id))
    return a_view(
        models=tuple(a_model(name, file_bytes=8 * GB, max_replicas=99) for name in MODELS),
        nodes=tuple(nodes),
        reservations=tuple(reservations),
    )


def alike(node_id: str, gigabytes_per_second: float, slots: int) -> Node:
    """A node that differs from others in its disk's rate and its slots alone."""
    return Node(
        node_id=NodeId(node_id),
        devices=tuple(Device(index=index, kind="cpu", memory_bytes=0) for index in range(slots)),
        stages={"disk": Stage(bytes_per_second=gigabytes_per_second * GB)},
        warm_workers=4,
        last_seen_seconds=NOW_SECONDS,
    )


def test_of_a_hundred_equal_nodes_few_are_worked_out() -> None:
    view = a_view(models=(a_model("m0"),), nodes=tuple(alike(f"n{index:02}", 1.0, 1) for index in range(99)))

    found = place(view, ModelName("m0"), NOW_SECONDS, POLICY)

    assert isinstance(found, Placed)
    assert found.node_id == "n00"
    assert len(found.options) < 9


@settings(max_examples=20, deadline=None)
@given(views(), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 5)), max_size=8))
def test_an_index_kept_by_fold_is_the_one_made_anew(
    view: View, happenings: list[tuple[int, int, int]]
) -> None:
    for kind, first, second in happenings:
        node_ids, replica_ids = sorted(view.nodes), sorted(view.reservations)
        node_id = node_ids[first % len(node_ids)]
        if kind == 0:
            view = fold(view, NodeDisconnected(node_id=node_id))
        elif kind == 1:
            node = replace(view.nodes[node_id], warm_workers=second, last_seen_seconds=NOW_SECONDS + first)
            view = fold(view, NodeReported(node=node))
        elif kind == 2 and replica_ids:
            stop = StopOrdered(replica_id=replica_ids[second % len(replica_ids)], now_seconds=NOW_SECONDS)
            view = fold(view, stop)
        elif kind == 3:
            told = [
                replace(each, sessions=second, context_tokens=9 * second, idle_since_seconds=None)
                for each in view.nodes[node_id].replicas.values()
            ][first:]
            report = LoadReported(
                node_id=node_id,
                replicas=tuple(told),
                seen_seconds=NOW_SECONDS,
                queued_bytes={"disk": second * GB} if first else None,
            )
            view = fold(view, report)
        else:
            reserved = a_reservation(f"new-{first}-{second}", MODELS[second], node_id, reported=False)
            view = fold(view, Reserved(reservation=reserved))

    assert index_of(view) == index_of(replace(view, index=None))


@settings(max_examples=20, deadline=None)
@given(views(), st.sampled_from(MODELS))
def test_idle_victims_are_those_that_brute_force_chooses(view: View, name: str) -> None:
    situation = situation_of(view, ModelName(name), NOW_SECONDS, POLICY)

    found = search(situation, exhaustive=True)

    for option in found.options:
        if option.victims:
            assert option.disturbance_seconds <= least_disturbance(situation, option.node_id) + 1e-9
    assert found.options == tuple(sorted(found.options, key=lambda option: rank(option, POLICY)))


def least_disturbance(situation: Any, node_id: NodeId) -> float:
    """Return the least disturbance of all sets of idle replicas that make room on a node, fewest first."""
    node = situation.view.nodes[node_id]
    assert never_fits(situation.model, node) is None
    summary = situation.index.summaries[node_id]
    keys = {replica_id: key for key, replica_id in summary.worth_keys}
    idle = [
        trait.reservation
        for trait in summary.traits
        if trait.reservation.model != situation.model.name
        and idle_may_go(situation, trait)
        and situation.view.models[trait.reservation.model].min_replicas == 0
    ]
    costs = [
        sum(worth_seconds(keys[each.replica_id], situation.now_seconds) for each in chosen)
        for count in range(1, len(idle) + 1)
        for chosen in combinations(idle, count)
        if enough(situation, node, chosen)
    ]
    return min(costs, default=float("inf"))


def test_one_large_model_takes_the_place_of_several_small_ones_that_move() -> None:
    """Three running replicas of one device each go to three different nodes."""
    small, large = a_model("s", max_replicas=9), a_model("l", devices=4)
    four = tuple(Device(index=index, kind="cpu", memory_bytes=0) for index in range(4))
    one = four[:1]
    replicas = tuple(
        a_replica(
            f"s.{index}", "s", devices=(index,), sessions=1, context_tokens=100, idle_since_seconds=None
        )
        for index in range(3)
    )
    big = Node(
        node_id=NodeId("big"),
        devices=four,
        replicas={replica.replica_id: replica for replica in replicas},
        warm_workers=1,
    )
    others = tuple(Node(node_id=NodeId(f"n{index}"), devices=one, warm_workers=1) for index in range(3))
    view = a_view(
        models=(small, large),
        nodes=(big, *others),
        reservations=tuple(a_reservation(f"s.{i}", "s", "big", devices=(i,)) for i in range(3)),
    )

    moved = place(view, ModelName("l"), NOW_SECONDS, Policy(may_migrate=True))
    crowded = replace(view, nodes={key: node for key, node in view.nodes.items() if key != "n2"})

    assert isinstance(moved, Migrate)
    assert sorted(move.to_node_id for move in moved.moves) == ["n0", "n1", "n2"]
    assert isinstance(place(crowded, ModelName("l"), NOW_SECONDS, Policy(may_migrate=True)), Wait)
