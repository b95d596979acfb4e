"""The simulated world against what is known without it: arrival gaps, queueing formulas, arithmetic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from services.controller.simulation import baselines
from services.controller.simulation.hardware import A40, PAPER_NODE, ModelSpec, NodeSpec, opt_models
from services.controller.simulation.report import summarise
from services.controller.simulation.workload import Request
from services.controller.simulation.world import World
from stoker.ids import ModelName
from stoker.units import GB

INSTANT = NodeSpec(
    device=A40,
    device_count=64,
    dram_bytes=GB,
    disk_bytes=GB,
    disk_bytes_per_second=GB,
    network_bytes_per_second=GB,
    overhead_seconds=0.0,
)


def weightless(name: str, keep_alive_seconds: float) -> ModelSpec:
    """A model that loads and answers in no time."""
    return ModelSpec(
        name=ModelName(name),
        weight_bytes=0,
        parameters=0,
        kv_bytes_per_token=0,
        max_replicas=1,
        keep_alive_seconds=keep_alive_seconds,
    )


def of_tokens(token_seconds: float) -> ModelSpec:
    """A model whose answer takes `token_seconds` a token, and whose prompt takes one more."""
    weight_bytes = round(token_seconds * 0.735 * A40.memory_bytes_per_second)
    return ModelSpec(
        name=ModelName("m"),
        weight_bytes=weight_bytes,
        parameters=1,
        kv_bytes_per_token=0,
        keep_alive_seconds=1e9,
        max_replicas=1,
    )


def run(world: World, requests: list[Request]) -> World:
    world.run(requests)
    return world


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_with_unlimited_devices_cold_starts_are_the_gaps_longer_than_the_keep_alive(cv: float) -> None:
    keep_alive_seconds = 10.0
    generator = np.random.default_rng(3)
    models = [weightless(f"m{index}", keep_alive_seconds) for index in range(20)]
    requests, cold = [], 0
    for model in models:
        times = np.cumsum(np.maximum(1e-6, generator.gamma(1 / cv**2, 12.0 * cv**2, size=300)))
        requests += [Request(float(at), model.name, 1, 1) for at in times]
        cold += 1 + int((np.diff(times) > keep_alive_seconds).sum())
    requests.sort(key=lambda request: request.arrival_seconds)

    world = run(World([INSTANT], models, baselines.serverless(1)), requests)

    assert summarise(world).starts == cold
    assert summarise(world).cold == pytest.approx(cold / len(requests))


@pytest.mark.parametrize(
    ("distribution", "squared_cv"), [("exponential", 1.0), ("constant", 0.0), ("two-point", 0.64)]
)
def test_one_replica_waits_as_pollaczek_and_khinchine_say(distribution: str, squared_cv: float) -> None:
    """M/M/1, M/D/1 and an M/G/1 queue within 3 %: mean wait = rho (1 + cv^2) / (2 (1 - rho)) of a service."""
    generator = np.random.default_rng(11)
    count, mean_tokens, load = 60_000, 1000, 0.5
    answers = {
        "exponential": np.ceil(generator.exponential(mean_tokens, count)),
        "constant": np.full(count, mean_tokens),
        "two-point": generator.choice([200, 1800], count),
    }[distribution]
    model = of_tokens(0.001)
    service_seconds = answers.mean() * 0.001
    arrivals = np.cumsum(generator.exponential(service_seconds / load, count))
    requests = [
        Request(float(at), model.name, 1, int(answer)) for at, answer in zip(arrivals, answers, strict=True)
    ]
    node = replace(INSTANT, device_count=1, dram_bytes=10 * GB)

    world = run(World([node], [model], baselines.serverless(1), timeout_seconds=1e9), requests)

    expected_seconds = load * (1 + squared_cv) / (2 * (1 - load)) * service_seconds
    assert summarise(world).startup_mean == pytest.approx(expected_seconds, rel=0.03)


def test_two_loads_share_a_disk_and_each_takes_twice_as_long() -> None:
    models = opt_models("opt-6.7b", 2)
    requests = [Request(0.0, model.name, 10, 1) for model in models]

    world = run(World([PAPER_NODE], models, baselines.serverless(1)), requests)

    alone_seconds = models[0].weight_bytes / PAPER_NODE.disk_bytes_per_second
    assert [session.wait_seconds for session in world.sessions] == pytest.approx(
        [2 * alone_seconds + PAPER_NODE.overhead_seconds] * 2
    )


def test_a_checkpoint_that_was_loaded_comes_from_memory_the_next_time() -> None:
    model = replace(opt_models("opt-6.7b", 1)[0], keep_alive_seconds=1.0)
    requests = [Request(0.0, model.name, 10, 1), Request(100.0, model.name, 10, 1)]

    world = run(World([PAPER_NODE], [model], baselines.serverless(1)), requests)

    first, second = (session.wait_seconds for session in world.sessions)
    assert first == pytest.approx(model.weight_bytes / PAPER_NODE.disk_bytes_per_second + 0.1)
    assert second == pytest.approx(model.weight_bytes / A40.bus_bytes_per_second + 0.1)
    assert world.counters.bytes_by_tier == {"disk": model.weight_bytes, "dram": model.weight_bytes}


def test_a_move_frees_the_node_and_costs_the_session_a_short_pause() -> None:
    model = opt_models("opt-6.7b", 1)[0]
    world = World([PAPER_NODE] * 2, [model], baselines.serverless(1))
    source_node, target_node = world.nodes.values()
    moved: list[bool] = []

    def move() -> None:
        replica = next(iter(world.replicas[model.name]))
        node = target_node if replica.node is source_node else source_node
        world.migrate(replica, node, (0,))
        moved.append(True)

    world.clock.at(6.0, move)
    run(world, [Request(0.0, model.name, 10, 400)])

    session = world.sessions[0]
    undisturbed = 400 * model.token_seconds(A40) + session.wait_seconds
    assert moved
    assert session.migrations == 1
    assert session.ends_seconds == pytest.approx(undisturbed + 0.05)
    assert not session.lost


def test_a_preempted_session_begins_again_and_its_wait_counts() -> None:
    model = opt_models("opt-6.7b", 1)[0]
    world = World([PAPER_NODE], [model], baselines.serverless(1))
    world.clock.at(6.0, lambda: world.preempt(next(iter(world.replicas[model.name]))))
    run(world, [Request(0.0, model.name, 10, 400)])

    session = world.sessions[0]
    again_seconds = model.weight_bytes / A40.bus_bytes_per_second + 0.1
    assert session.preemptions == 1
    assert session.ends_seconds == pytest.approx(6.0 + again_seconds + 400 * model.token_seconds(A40))


def test_a_request_that_nothing_can_serve_in_time_is_lost_and_counts_its_whole_wait() -> None:
    model = opt_models("opt-6.7b", 1)[0]
    requests = [Request(0.0, model.name, 10, 100_000), Request(1.0, model.name, 10, 1)]
    node = replace(PAPER_NODE, device_count=1)

    world = run(World([node], [model], baselines.serverless(1), timeout_seconds=60.0), requests)

    assert [session.lost for session in world.sessions] == [False, True]
    assert world.sessions[1].wait_seconds == pytest.approx(60.0)


def test_a_failed_node_loses_nothing_but_time() -> None:
    model = opt_models("opt-6.7b", 1)[0]
    world = World([PAPER_NODE] * 2, [model], baselines.serverless(1))

    def fail() -> None:
        replica = next(iter(world.replicas[model.name]))
        world.fail_node(replica.node, for_seconds=50.0)

    world.clock.at(6.0, fail)
    run(world, [Request(0.0, model.name, 10, 400)])

    assert summarise(world).lost == 0
    assert world.sessions[0].preemptions == 1
    assert world.counters.busy_device_seconds == pytest.approx(world.counters.held_device_seconds, rel=0.5)
