"""What replicas that start at once on one host share, and what not."""

from __future__ import annotations

import pytest

from services.controller.simulation import baselines
from services.controller.simulation.hardware import A40, PAPER_NODE, opt_models
from services.controller.simulation.workload import Request
from services.controller.simulation.world import SHARED, World

MODEL = opt_models("opt-6.7b", 1)[0]
DISK_SECONDS = MODEL.weight_bytes / PAPER_NODE.disk_bytes_per_second


def test_two_replicas_of_a_model_on_one_host_share_one_read_of_the_disk() -> None:
    world = World([PAPER_NODE], [MODEL], baselines.serverless(1))

    world.run([Request(0.0, MODEL.name, 10, 1)] * 2)

    assert [session.wait_seconds for session in world.sessions] == pytest.approx([DISK_SECONDS + 0.1] * 2)
    assert world.counters.bytes_by_tier == {"disk": MODEL.weight_bytes, SHARED: MODEL.weight_bytes}


def test_who_joins_late_still_copies_all_bytes_over_its_own_bus() -> None:
    world = World([PAPER_NODE], [MODEL], baselines.serverless(1))
    late_seconds = DISK_SECONDS - 0.01

    world.run([Request(0.0, MODEL.name, 10, 400), Request(late_seconds, MODEL.name, 10, 1)])

    copy_seconds = MODEL.weight_bytes / A40.bus_bytes_per_second
    assert world.sessions[1].wait_seconds == pytest.approx(copy_seconds + 0.1)


def test_a_read_goes_on_for_the_other_one_when_the_first_start_is_given_up() -> None:
    world = World([PAPER_NODE], [MODEL], baselines.serverless(1))
    node = world.nodes[next(iter(world.nodes))]
    first = world.start(MODEL, node, (0,))
    second = world.start(MODEL, node, (1,))
    world.clock.at(1.0, lambda: world.stop(first))

    world.run([])

    assert second.ready_seconds == pytest.approx(DISK_SECONDS + 0.1)
    assert MODEL.name in node.dram


def test_a_read_that_nobody_waits_for_any_more_ends() -> None:
    world = World([PAPER_NODE], [MODEL], baselines.serverless(1))
    node = world.nodes[next(iter(world.nodes))]
    replica = world.start(MODEL, node, (0,))
    world.clock.at(1.0, lambda: world.stop(replica))

    world.run([])

    assert not world.loads.is_coming(node.node_id, MODEL.name)
    assert MODEL.name not in node.dram
