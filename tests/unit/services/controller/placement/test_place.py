"""Placement: what the scenarios don't show, one rule a test."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.controller.cluster_view.demand import Demand
from services.controller.cluster_view.view import Device, Held, Policy, Pool
from services.controller.placement.place import Placed, StopIdle, Unplaceable, Wait, place
from stoker.ids import ModelName
from stoker.units import GB
from tests.unit.services.controller.builders import (
    NOW_SECONDS,
    a_model,
    a_node,
    a_replica,
    a_reservation,
    a_view,
)

POLICY = Policy()
M = ModelName("m")


def test_a_placement_carries_every_option_it_chose_from() -> None:
    view = a_view(models=(a_model(),), nodes=(a_node("a"), a_node("b", warm_workers=0)))

    decision = place(view, M, NOW_SECONDS, POLICY)

    assert isinstance(decision, Placed)
    assert [option.node_id for option in decision.options] == ["a", "b"]
    assert decision.estimate == decision.options[0].estimate


def test_an_idle_replica_on_the_node_with_the_checkpoint_goes_when_that_is_much_faster() -> None:
    """The smallest estimated time wins, what the victim costs included."""
    model, victim = a_model(file_bytes=60 * GB), a_model("v")
    local = a_node(
        "a",
        held={(model.checkpoint_uri, model.revision): Held(dram_bytes=60 * GB)},
        replicas=(a_replica("v.1", "v"),),
    )
    view = a_view(
        models=(model, victim),
        nodes=(local, a_node("b")),
        reservations=(a_reservation("v.1", "v"),),
    )

    decision = place(view, M, NOW_SECONDS, POLICY)

    assert isinstance(decision, StopIdle)
    assert decision.victims == ("v.1",)


def test_a_replica_that_is_wanted_or_the_last_of_its_minimum_is_no_victim() -> None:
    node = a_node(replicas=(a_replica("v.1", "v"),))
    reserved = (a_reservation("v.1", "v"),)
    wanted = a_view(
        models=(a_model(), a_model("v")),
        nodes=(node,),
        reservations=reserved,
        demands={ModelName("v"): Demand(since_seconds=0, waiters=1)},
    )
    minimum = a_view(models=(a_model(), a_model("v", min_replicas=1)), nodes=(node,), reservations=reserved)

    for view in (wanted, minimum):
        assert isinstance(place(view, M, NOW_SECONDS, POLICY), Wait)


def test_a_replica_in_its_minimum_residency_is_waited_for_until_that_ends() -> None:
    node = a_node(replicas=(a_replica("v.1", "v", ready_since_seconds=NOW_SECONDS - 0.5),))
    view = a_view(models=(a_model(), a_model("v")), nodes=(node,), reservations=(a_reservation("v.1", "v"),))

    decision = place(view, M, NOW_SECONDS, POLICY)

    assert isinstance(decision, Wait)
    assert decision.retry_at_seconds == NOW_SECONDS + 1.5


def test_an_idle_replica_that_has_served_goes_within_its_minimum_residency() -> None:
    young = a_replica("v.1", "v", ready_since_seconds=NOW_SECONDS - 0.5, has_served=True)
    view = a_view(
        models=(a_model(), a_model("v")),
        nodes=(a_node(replicas=(young,)),),
        reservations=(a_reservation("v.1", "v"),),
    )

    decision = place(view, M, NOW_SECONDS, POLICY)

    assert isinstance(decision, StopIdle)
    assert decision.victims == ("v.1",)


def test_no_more_replicas_are_stopped_than_the_pool_needs() -> None:
    """Small ones that are cheapest to lose are spared when the larger one must go anyway."""
    small, large, model = (
        a_model("s", file_bytes=GB),
        a_model("l", file_bytes=8 * GB),
        a_model(file_bytes=8 * GB),
    )
    held = {
        (small.checkpoint_uri, small.revision): Held(dram_bytes=GB, leases=1),
        (large.checkpoint_uri, large.revision): Held(dram_bytes=8 * GB, leases=1),
    }
    node = a_node(
        devices=3,
        pool=Pool(total_bytes=10 * GB, leased_bytes=9 * GB),
        held=held,
        replicas=(a_replica("s.1", "s"), a_replica("l.1", "l", devices=(1,))),
    )
    view = a_view(
        models=(small, large, model),
        nodes=(node,),
        reservations=(a_reservation("s.1", "s"), a_reservation("l.1", "l", devices=(1,))),
    )

    decision = place(view, M, NOW_SECONDS, POLICY)

    assert isinstance(decision, StopIdle)
    assert decision.victims == ("l.1",)


def test_two_replicas_of_one_checkpoint_share_its_place_in_the_pool() -> None:
    model = a_model(file_bytes=8 * GB, max_replicas=2)
    node = a_node(
        devices=2,
        pool=Pool(total_bytes=10 * GB, leased_bytes=8 * GB),
        held={(model.checkpoint_uri, model.revision): Held(dram_bytes=8 * GB, leases=1)},
        replicas=(a_replica("m.1"),),
    )
    view = a_view(models=(model,), nodes=(node,), reservations=(a_reservation("m.1"),))

    decision = place(view, M, NOW_SECONDS, POLICY)

    assert isinstance(decision, Placed)
    assert decision.devices == (1,)


def test_scaling_up_takes_free_slots_only() -> None:
    node = a_node(replicas=(a_replica("v.1", "v"),))
    view = a_view(models=(a_model(), a_model("v")), nodes=(node,), reservations=(a_reservation("v.1", "v"),))

    assert isinstance(place(view, M, NOW_SECONDS, POLICY, may_disturb=False), Wait)
    assert isinstance(place(view, M, NOW_SECONDS, POLICY), StopIdle)


def test_a_slot_that_something_unreserved_occupies_is_not_free() -> None:
    view = a_view(models=(a_model(),), nodes=(a_node(replicas=(a_replica("stray", "x"),)),))

    assert isinstance(place(view, M, NOW_SECONDS, POLICY), Wait)


def test_a_device_that_is_too_small_is_passed_over_for_one_that_is_not() -> None:
    devices = (
        Device(index=0, kind="cuda", memory_bytes=8 * GB),
        Device(index=1, kind="cuda", memory_bytes=80 * GB),
    )
    model = a_model(weight_bytes=9 * GB, kv_cache_bytes=GB)
    view = a_view(models=(model,), nodes=(replace(a_node(), devices=devices),))

    decision = place(view, M, NOW_SECONDS, POLICY)

    assert isinstance(decision, Placed)
    assert decision.devices == (1,)


@pytest.mark.parametrize("nodes", [1, 9])
def test_what_can_never_be_placed_says_why_for_a_bounded_number_of_nodes(nodes: int) -> None:
    view = a_view(
        models=(a_model(file_bytes=200 * GB),), nodes=tuple(a_node(f"n{index}") for index in range(nodes))
    )

    decision = place(view, M, NOW_SECONDS, POLICY)

    assert isinstance(decision, Unplaceable)
    assert decision.code == "does_not_fit"
    assert len(decision.reasons) == min(nodes, 5) + (1 if nodes == 1 else 2)
