"""Invariants over random histories: the controller's rules together, not one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.controller.cluster_view.events import (
    Demanded,
    DemandEnded,
    ModelDeleted,
    ModelPut,
    NodeDisconnected,
    StopRefused,
)
from services.controller.cluster_view.fleet import Standing, members_of
from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.view import Device, Phase, Policy, View
from services.controller.placement.place import Wait, place
from services.controller.scaling import reconcile as reconcile_module
from services.controller.scaling.actions import Plan, Start
from services.controller.scaling.planner import Planner
from services.controller.scaling.reconcile import reconcile
from services.controller.scaling.starting import lacking, lacks_more_room
from stoker.ids import ModelName, NodeId, ReplicaId
from tests.scenarios import world as scenario_world
from tests.scenarios.world import World, model
from tests.unit.services.controller.builders import a_node

MODELS = ("m0", "m1", "m2", "m3")
NODES = ("a", "b", "c")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            (
                "ask",
                "leave",
                "ready",
                "fails",
                "stopped",
                "busy",
                "sessions",
                "idle",
                "wait",
                "silent",
                "back",
                "restart",
                "delete",
                "deploy",
                "join",
            )
        ),
        st.integers(0, 7),
        st.integers(0, 7),
    ),
    max_size=60,
)


def a_world() -> World:
    world = World(policy=Policy(minimum_residency_seconds=0.5))
    for index, name in enumerate(MODELS):
        world.apply(
            ModelPut(model=model(name, max_replicas=1 + index % 2, concurrency=1, min_replicas=index // 3))
        )
    join(world, "a", 2)
    join(world, "b", 1)
    return world


def join(world: World, node_id: str, devices: int) -> None:
    slots = tuple(Device(index=index, kind="cpu", memory_bytes=0) for index in range(devices))
    node = replace(a_node(node_id), devices=slots)
    world.nodes.setdefault(node.node_id, node)
    world.silent.discard(node.node_id)
    world.report(node.node_id)


def step(world: World, verb: str, first: int, second: int) -> None:
    name = ModelName(MODELS[first % len(MODELS)])
    node_id = NodeId(NODES[first % len(NODES)])
    running = sorted(replica_id for node in world.nodes.values() for replica_id in node.replicas)
    replica_id = running[first % len(running)] if running else None
    match verb:
        case "ask" if name in world.view.models:
            world.apply(Demanded(model=name, now_seconds=world.now_seconds))
        case "leave" if name in world.view.demands:
            world.apply(DemandEnded(model=name))
        case "wait":
            world.wait(float(second))
        case "silent" if node_id in world.nodes:
            world.silent.add(node_id)
            world.apply(NodeDisconnected(node_id=node_id))
        case "back" | "join":
            join(world, node_id, 1 + second % 3)
        case "restart":
            world.silent |= set(world.nodes)
            world.restart_controller()
        case "delete" if name in world.view.models:
            world.apply(ModelDeleted(name=name), *([DemandEnded(model=name)] * 50))
        case "deploy":
            world.apply(ModelPut(model=model(name, runtime=f"v{second}")))
        case _ if replica_id is not None:
            happen_to(world, verb, replica_id, second)
        case _:
            pass


def happen_to(world: World, verb: str, replica_id: ReplicaId, count: int) -> None:
    phase = world.node_of(replica_id).replicas[replica_id].phase
    node_id = world.node_of(replica_id).node_id
    if node_id in world.silent:
        return
    match verb:
        case "ready" if phase is Phase.STARTING:
            world.change_replica(replica_id, phase=Phase.READY, idle_since_seconds=world.now_seconds)
        case "fails":
            world.change_replica(replica_id, phase=Phase.FAILED, sessions=0, idle_since_seconds=None)
        case "sessions" if phase is Phase.READY:
            world.change_replica(replica_id, sessions=1 + count, idle_since_seconds=None)
        case "idle" if phase is Phase.READY:
            world.change_replica(replica_id, sessions=0, idle_since_seconds=world.now_seconds)
        case "busy":
            world.apply(StopRefused(replica_id=replica_id, busy=True))
        case "stopped":
            world.remove_replica(replica_id)
        case _:
            pass


def check(world: World) -> None:
    view = world.view
    slots = Counter(
        (reservation.node_id, device)
        for reservation in view.reservations.values()
        for device in reservation.devices
    )
    assert all(count == 1 for count in slots.values()), "a device has two owners"
    running = Counter(
        (node.node_id, device)
        for node in world.nodes.values()
        for replica in node.replicas.values()
        for device in replica.devices
    )
    assert all(count == 1 for count in running.values()), "two replicas run on one device"
    for node in view.nodes.values():
        known = {device.index for device in node.devices}
        for reservation in view.reservations.values():
            assert reservation.node_id != node.node_id or set(reservation.devices) <= known
    for name, demand in view.demands.items():
        assert demand.waiters >= 1, name
    planner = Planner(view, world.now_seconds, world.policy)
    for name in view.refusals:
        for may_disturb in (True, False):
            if planner.still_waits(name, may_disturb=may_disturb) and not lacks_more_room(planner, name):
                decision = place(
                    view,
                    name,
                    world.now_seconds,
                    world.policy,
                    may_disturb=may_disturb,
                    lacking=max(1, lacking(planner, name)),
                )
                assert isinstance(decision, Wait), "there is room"


def check_starts(world: World, name: ModelName) -> None:
    """At most one start in flight per replica that the waiting requests of a cold model need."""
    view = world.view
    model = view.models[name]
    members = [found for found in members_of(view, name) if not found.stale]
    if any(found.standing is Standing.READY for found in members):
        return
    demand = view.demands.get(name)
    needed = max(model.min_replicas, -(-(demand.waiters if demand else 0) // model.concurrency))
    starting = sum(found.standing is Standing.STARTING for found in members)
    plan = reconcile(view, world.now_seconds, world.policy)
    ordered = sum(isinstance(action, Start) and action.model == name for action in plan.actions)
    assert ordered == 0 or starting + ordered <= min(needed, model.max_replicas), name


def shuffled(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    return dict(reversed(list(mapping.items())))


def reordered(view: View) -> View:
    return replace(
        view,
        models=shuffled(view.models),
        nodes=shuffled(
            {key: replace(node, replicas=shuffled(node.replicas)) for key, node in view.nodes.items()}
        ),
        reservations=shuffled(view.reservations),
        demands=shuffled(view.demands),
        failures=shuffled(view.failures),
        refusals=shuffled(view.refusals),
        always=frozenset(sorted(view.always, reverse=True)),
    )


@settings(max_examples=60, deadline=None)
@example([("ask", 1, 0), ("delete", 1, 0), ("ask", 0, 0)])  # stopped before it was ever reported
@given(STEPS)
def test_no_device_ever_has_two_owners_and_decisions_settle(steps: list[tuple[str, int, int]]) -> None:
    """`World` itself fails when decisions don't settle."""
    world = a_world()

    for verb, first, second in steps:
        step(world, verb, first, second)
        check(world)


@settings(max_examples=30, deadline=None)
@given(STEPS, st.integers(1, 6))
def test_a_cold_model_has_at_most_one_start_in_flight_per_replica_it_needs(
    steps: list[tuple[str, int, int]], more: int
) -> None:
    """Asked of the plan, with requests in the view that nothing was decided about yet."""
    world = a_world()
    for verb, first, second in steps:
        step(world, verb, first, second)
    for name in MODELS:
        if ModelName(name) in world.view.models:
            for _ in range(more):
                world.view = fold(world.view, Demanded(model=ModelName(name), now_seconds=world.now_seconds))
            check_starts(world, ModelName(name))


@settings(max_examples=30, deadline=None)
@given(STEPS)
def test_decisions_do_not_depend_on_the_order_of_dicts(steps: list[tuple[str, int, int]]) -> None:
    world = a_world()
    for verb, first, second in steps:
        step(world, verb, first, second)
    world.apply(Demanded(model=ModelName("m0"), now_seconds=world.now_seconds))
    view, later_seconds = world.view, world.now_seconds + 400

    assert reconcile(view, later_seconds, world.policy) == reconcile(
        reordered(view), later_seconds, world.policy
    )
    for name in view.models:
        ours = place(view, name, later_seconds, world.policy)
        assert ours == place(reordered(view), name, later_seconds, world.policy)


@settings(max_examples=30, deadline=None)
@given(STEPS)
def test_a_look_at_which_nothing_is_due_leaves_out_nothing(steps: list[tuple[str, int, int]]) -> None:
    """Most looks end with a comparison of two moments; all the rest of them must come to the same."""

    def compared(view: View, now_seconds: float, policy: Policy) -> Plan:
        plan = reconcile(view, now_seconds, policy)
        with patch.object(reconcile_module, "_nothing_is_due", return_value=None):
            whole = reconcile(view, now_seconds, policy)

        assert plan == whole
        return plan

    world = a_world()
    with patch.object(scenario_world, "reconcile", compared):  # of every view on the way, settled or not
        for verb, first, second in steps:
            step(world, verb, first, second)


@settings(max_examples=25, deadline=None)
@given(STEPS)
def test_every_waiting_request_is_served_once_nothing_else_happens(steps: list[tuple[str, int, int]]) -> None:
    """No starvation: with agents that do as told, whoever waits gets a replica."""
    world = a_world()
    for verb, first, second in steps:
        step(world, verb, first, second)
    for node_id in NODES:
        join(world, node_id, 2)
    for name in MODELS:
        world.apply(ModelPut(model=model(name)))
        world.apply(Demanded(model=ModelName(name), now_seconds=world.now_seconds))
    served: set[str] = set()

    for _ in range(100):
        for replica_id in sorted(key for node in world.nodes.values() for key in node.replicas):
            obey(world, replica_id)
        for name in MODELS:
            if name not in served and type(world.answer(ModelName(name))).__name__ == "Ready":
                served.add(name)
                while ModelName(name) in world.view.demands:
                    world.apply(DemandEnded(model=ModelName(name)))
        world.wait(1.0)

    assert served == set(MODELS)
    running = {replica_id for node in world.nodes.values() for replica_id in node.replicas}
    assert set(world.view.reservations) == running, "a reservation has no owner"


@pytest.mark.parametrize(("devices", "models"), [(1, 2), (1, 4), (2, 3), (3, 4)])
def test_nobody_waits_longer_than_the_bound_for_each_who_came_before_though_no_stream_ever_ends(
    devices: int, models: int
) -> None:
    world = World(policy=Policy(minimum_residency_seconds=0.5, waiting_bound_seconds=10.0))
    names = [ModelName(f"m{index}") for index in range(models)]
    join(world, "a", devices)
    for name in names:
        world.apply(ModelPut(model=model(name)), Demanded(model=name, now_seconds=world.now_seconds))
    waits, served = dict.fromkeys(names, 0.0), set[ModelName]()

    for _ in range(60):
        for replica_id, replica in sorted(world.nodes[NodeId("a")].replicas.items()):
            reservation = world.view.reservations[replica_id]
            if reservation.stopping_since_seconds is not None:
                world.remove_replica(replica_id)  # its stream waits again
                world.apply(Demanded(model=reservation.model, now_seconds=world.now_seconds))
                waits[reservation.model] = 0.0
            elif replica.phase is Phase.STARTING:
                world.change_replica(replica_id, phase=Phase.READY, sessions=1)
                world.apply(DemandEnded(model=reservation.model))
                served.add(reservation.model)
        world.wait(1.0)
        for name in world.view.demands:
            waits[name] += 1.0
        assert max(waits.values()) <= models * (world.policy.waiting_bound_seconds + 3.0)

    assert served == set(names)


def obey(world: World, replica_id: ReplicaId) -> None:
    """Do what an agent would: end what is to be stopped, finish what starts, end what runs."""
    replica = world.node_of(replica_id).replicas[replica_id]
    reservation = world.view.reservations.get(replica_id)
    if reservation is None or reservation.stopping_since_seconds is not None:
        world.remove_replica(replica_id)
    elif replica.phase is Phase.STARTING or replica.sessions:
        world.change_replica(replica_id, phase=Phase.READY, sessions=0, idle_since_seconds=world.now_seconds)
