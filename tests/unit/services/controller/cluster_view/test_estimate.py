"""Estimates: a pipeline is as slow as its slowest stage, and what was measured beats the seeds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.controller.cluster_view.estimate import (
    SEED_BYTES_PER_SECOND,
    Estimate,
    learnt_parts,
    start_estimate,
)
from services.controller.cluster_view.learnt import StartStages
from services.controller.cluster_view.summary import summary_of
from services.controller.cluster_view.view import Device, Held, Model, Node, Pool, Stage
from stoker.units import GB
from tests.unit.services.controller.builders import a_model, a_node, a_reservation, a_view


def estimate(model: Model, node: Node, measured: tuple[StartStages, ...] = (), **changes: int) -> Estimate:
    arguments = {"loading_bytes": 0, "starting_workers": 0} | changes
    return start_estimate(model, node, parts=learnt_parts(model, measured), **arguments)


def gpu_node(**bytes_per_second: float) -> Node:
    stages = {name: Stage(bytes_per_second=rate) for name, rate in bytes_per_second.items()}
    device = Device(index=0, kind="cuda", memory_bytes=80 * GB)
    return replace(a_node(stages=stages), devices=(device,))


def test_a_load_takes_as_long_as_its_slowest_stage_not_their_sum() -> None:
    found = estimate(a_model(file_bytes=12 * GB), gpu_node(disk=2 * GB, device=12 * GB))

    assert found.stage_seconds == {"disk": 6.0, "device": 1.0}
    assert found.load_seconds == 6.0


def test_bytes_that_wait_before_a_stage_are_read_first() -> None:
    busy = a_node(stages={"disk": Stage(bytes_per_second=GB, queued_bytes=3 * GB)})

    assert estimate(a_model(), busy).load_seconds == 4.0
    assert estimate(a_model(), a_node(), loading_bytes=5 * GB).load_seconds == 6.0


def test_only_the_bytes_that_are_not_in_memory_are_read_from_disk() -> None:
    model = a_model(file_bytes=10 * GB)
    key = (model.checkpoint_uri, model.revision)
    half = a_node(held={key: Held(dram_bytes=4 * GB)})
    whole = a_node(held={key: Held(dram_bytes=10 * GB)})

    assert (estimate(model, half).load_seconds, estimate(model, half).tier) == (6.0, "disk")
    assert (estimate(model, whole).load_seconds, estimate(model, whole).tier) == (0.0, "dram")


def test_a_model_larger_than_the_pool_is_always_read_whole_and_copied() -> None:
    model = a_model(file_bytes=10 * GB)
    held = {model.checkpoint: Held(dram_bytes=10 * GB)}
    stages = {"disk": Stage(bytes_per_second=GB), "device": Stage(bytes_per_second=0.5 * GB)}
    node = a_node(held=held, stages=stages, pool=Pool(total_bytes=4 * GB, window_bytes=GB))

    found = estimate(model, node, loading_bytes=3 * GB, is_coming=True)

    assert found.stage_seconds == {"disk": 13.0, "device": 20.0}
    assert found.tier == "disk"


def test_the_skeleton_is_built_while_the_weights_load() -> None:
    slow_skeleton = StartStages(skeleton_seconds=3.0, weights_seconds=1.0, total_seconds=3.0)

    found = estimate(a_model(), a_node(), (slow_skeleton,))
    assert found.total_seconds == pytest.approx(3.0)


def test_a_worker_must_be_spawned_when_the_warm_ones_are_spoken_for() -> None:
    node = a_node(warm_workers=1, worker_start_seconds=4.0)

    assert estimate(a_model(), node).worker_seconds == 0.0
    assert estimate(a_model(), node, starting_workers=1).worker_seconds == 4.0


def test_a_replica_of_several_ranks_waits_until_it_has_a_worker_for_each() -> None:
    node, ranks = a_node(warm_workers=2, worker_start_seconds=4.0), a_model(devices=2)

    assert estimate(ranks, node).worker_seconds == 0.0
    assert estimate(ranks, node, starting_workers=1).worker_seconds == 4.0
    assert estimate(a_model(), node, starting_workers=1).worker_seconds == 0.0


@pytest.mark.parametrize(("warm_workers", "seconds"), [(2, 0.0), (1, 0.5), (0, 4.0)])
def test_a_worker_that_is_on_its_way_helps_ranks_only_if_it_is_the_last_one(
    warm_workers: int, seconds: float
) -> None:
    node = a_node(warm_workers=warm_workers, worker_start_seconds=4.0, next_worker_seconds=0.5)

    assert estimate(a_model(devices=2), node).worker_seconds == seconds


def test_ranks_share_the_disk_and_copy_to_a_device_each() -> None:
    node = gpu_node(disk=2 * GB, device=3 * GB)

    found = estimate(a_model(file_bytes=12 * GB, devices=4), node)

    assert found.stage_seconds == {"disk": 6.0, "device": 1.0}


def test_ranks_that_were_ordered_have_a_warm_worker_each_coming_to_them() -> None:
    model = a_model(devices=2)
    node = a_node(devices=3, warm_workers=2, worker_start_seconds=4.0)
    ordered = a_reservation("m.1", model.name, node.node_id, devices=(0, 1), reported=False)
    view = a_view(models=(model,), nodes=(node,), reservations=(ordered,))

    summary = summary_of(view, node.node_id, (ordered,))

    assert (summary.starting_workers, summary.worker_seconds) == (2, 4.0)


def test_a_stage_nobody_has_measured_gets_a_seed() -> None:
    found = estimate(a_model(file_bytes=1 * GB), a_node(stages={}))

    assert found.stage_seconds == {"disk": GB / SEED_BYTES_PER_SECOND["disk"]}


def test_one_slow_start_does_not_change_what_was_learnt_from_the_others() -> None:
    usual = StartStages(skeleton_seconds=0.2, first_forward_seconds=0.1, total_seconds=0.4)
    stalled = StartStages(skeleton_seconds=9.0, first_forward_seconds=5.0, total_seconds=60.0)

    assert estimate(a_model(), a_node(), (usual, usual, stalled)) == estimate(a_model(), a_node(), (usual,))


def test_the_parts_add_up_to_the_total() -> None:
    found = Estimate(
        worker_seconds=1,
        stage_seconds={"disk": 5, "device": 2},
        skeleton_seconds=3,
        first_forward_seconds=7,
        stop_seconds=11,
        overhead_seconds=13,
    )

    assert found.total_seconds == 11 + 1 + max(5, 3 + 7) + 13
