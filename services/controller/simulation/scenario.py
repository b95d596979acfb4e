"""What is simulated: hosts, models and requests, put together from what a user asks for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from services.controller.cluster_view.view import Policy
from services.controller.scaling.foresight import Limits
from services.controller.scaling.rebalancing import RebalanceLimits
from services.controller.simulation import baselines
from services.controller.simulation.hardware import (
    H100,
    OPT_SIZES,
    PAPER_NODE,
    ModelSpec,
    NodeSpec,
    opt_models,
)
from services.controller.simulation.ours import Ours
from services.controller.simulation.parts import SimNode
from services.controller.simulation.report import Summary, summarise
from services.controller.simulation.workload import Request
from services.controller.simulation.world import Decider, World
from stoker.errors import InvalidRequest
from stoker.units import GB

H100_NODE = NodeSpec(
    device=H100,
    device_count=8,
    dram_bytes=1000 * GB,
    disk_bytes=28_000 * GB,
    disk_bytes_per_second=29.4 * GB,
    network_bytes_per_second=11.5 * GB,
)
HARDWARE: dict[str, NodeSpec] = {"paper": PAPER_NODE, "h100": H100_NODE}

POLICIES: dict[str, Callable[[int], Decider]] = {
    "stoker": lambda _seed: Ours(
        "stoker", Policy(may_migrate=True), limits=Limits(), levels=RebalanceLimits()
    ),
    "reactive": lambda _seed: Ours("stoker without forecasts", Policy(may_migrate=True)),
    "locality": lambda _seed: Ours("the same without moving", Policy(may_migrate=False)),
    "shepherd": lambda _seed: Ours(
        "preempting (Shepherd*)", Policy(may_migrate=True, rooms_at_once=1), preempts=True
    ),
    "serverless": baselines.serverless,
    "ray": baselines.ray_serve,
    "ray-cache": baselines.ray_serve_with_cache,
}
"""By the names that `stoker simulate --policy` takes; each makes a fresh policy from a seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Hosts that fail: how often over the whole cluster, for how long, and the seed of which and when."""

    per_hour: float = 0.0
    down_seconds: float = 60.0
    seed: int = 0


def parse_models(text: str) -> list[ModelSpec]:
    """Return the models that `opt-6.7b:32,opt-13b:16` names.

    Raises:
        InvalidRequest: A size is not known or named twice, or a count is none.
    """
    models: list[ModelSpec] = []
    named: set[str] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([\w.-]+)(?::(\d{1,5}))?\s*", part)
        if match is None or match[1] not in OPT_SIZES or int(match[2] or 1) < 1:
            known = ", ".join(OPT_SIZES)
            raise InvalidRequest(f"--models {part!r}: write SIZE:COUNT with a size of {known}, COUNT from 1")
        if match[1] in named:
            raise InvalidRequest(f"--models names {match[1]} twice: write it once, with their sum")
        named.add(match[1])
        models += opt_models(match[1], int(match[2] or 1))
    return models


def host(spec: NodeSpec, *, devices: int) -> NodeSpec:
    """Return a host with another number of devices; 0 = as it is."""
    return replace(spec, device_count=devices) if devices else spec


def simulate(  # noqa: PLR0913 - a scenario's parts, each named by its caller
    policies: Sequence[str],
    specs: Sequence[NodeSpec],
    models: Sequence[ModelSpec],
    requests: Sequence[Request],
    *,
    seed: int,
    timeout_seconds: float = 300.0,
    failures: Failures | None = None,
    standing_seconds: float = 0.0,
    then: Callable[[World], None] = lambda _world: None,
) -> list[Summary]:
    """Run the same requests under each policy.

    Args:
        policies: Keys of `POLICIES`.
        specs: Hosts.
        models: What is served.
        requests: In order of arrival.
        seed: Of the policies' own draws.
        timeout_seconds: A request that waits longer is lost.
        failures: Hosts that fail; None = none does.
        standing_seconds: How long the cluster stands, its models deployed, before the trace begins.
        then: Called with each world after its run.

    Raises:
        InvalidRequest: A model fits on no host.
    """
    for model in models:
        _check_fits(model, specs)
    later = requests
    if standing_seconds:
        later = [
            replace(request, arrival_seconds=request.arrival_seconds + standing_seconds)
            for request in requests
        ]
    summaries = []
    for name in policies:
        world = World(specs, models, POLICIES[name](seed), timeout_seconds=timeout_seconds)
        if standing_seconds:
            world.ask()
        if failures is not None and requests:
            _schedule(world, failures, until_seconds=later[-1].arrival_seconds)
        world.run(later)
        summaries.append(summarise(world))
        then(world)
    return summaries


def _check_fits(model: ModelSpec, specs: Sequence[NodeSpec]) -> None:
    """Refuse a model that no host has devices for: all its requests would wait in vain."""
    if any(model.devices_on(spec.device) <= spec.device_count for spec in specs):
        return
    most = max(specs, key=lambda spec: spec.device_count)
    raise InvalidRequest(
        f"{model.name} needs {model.devices_on(most.device)} {most.device.kind} of one host, the largest has "
        f"{most.device_count}: use hosts with more devices, or smaller models"
    )


def _schedule(world: World, failures: Failures, *, until_seconds: float) -> None:
    """Have hosts fail at random moments, the same under every policy."""
    generator = np.random.default_rng(failures.seed)
    nodes = list(world.nodes.values())
    count = generator.poisson(failures.per_hour * until_seconds / 3600)
    for at_seconds in generator.uniform(0, until_seconds, count):
        node = nodes[int(generator.integers(len(nodes)))]
        world.clock.at(float(at_seconds), partial(_fail, world, node, failures.down_seconds))


def _fail(world: World, node: SimNode, down_seconds: float) -> None:
    if not node.down:
        world.fail_node(node, for_seconds=down_seconds)
