"""Is the simulator right? A run of the real system beside the simulator's prediction of the same run.

    python benchmarks/real_against_simulated.py [--seconds 90] [--requests-per-second 0.7] [--seed 1]

Real: `stoker up` with 4 nodes of 2 devices, disks of 40 MB/s, random models of 16 to 96 MB, bursts of
requests (Gamma, CV 2, popularity falling as 1/rank). Simulated: the same arrivals, hosts, models and
keep-alive, under the same controller rules (`locality`). What the simulator can't know comes from a
calibration before the run, on a cluster of its own: the disks' rate, what a start takes beside its bytes, a
warm request's first token and its time per token, and how much longer a first token takes for each further
session that computes at the same time: all nodes of this run share the processors of one host, which the
simulator's nodes do not.

Judged: the mean start-up, from sending a request to its first token, over all requests. Target: within 15 %.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from arguments import not_negative, positive_float
from real_cluster import PATIENCE_SECONDS, RealCluster, Shape, real_cluster
from setting import median, print_heading
from small_models import small_model_bytes

from services.controller.simulation.hardware import MEMORY_SHARE, DeviceSpec, ModelSpec, NodeSpec
from services.controller.simulation.scenario import simulate
from services.controller.simulation.workload import Lengths, Request, gamma_requests
from services.controller.simulation.world import World
from stoker.ids import ModelName
from stoker.units import GB

TARGET = 0.15
SIZES_MB = (16, 24, 32, 40, 48, 56, 64, 72, 80, 96)
OUTPUT_TOKENS = 12
KEEP_ALIVE_SECONDS = 2.0
CV = 2.0
SHAPE = Shape(pool_bytes=2**30)
CALIBRATED = (1, 5, 8)
"""Models that the calibration starts, by their place in `SIZES_MB`."""
CROWDS = 3
"""How often the calibration has all of these answer at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What is measured before the run, and all that the simulator is told of it.

    Attributes:
        disk_bytes_per_second: Of a node.
        overhead_seconds: Of a start, beside its bytes.
        first_token_seconds: Of a warm request.
        token_seconds: Of each further token.
        crowding: What a first token takes longer for each further session that computes at the same time, as
            a share of itself.
    """

    disk_bytes_per_second: float
    overhead_seconds: float
    first_token_seconds: float
    token_seconds: float
    crowding: float

    def crowded_seconds(self, seconds: float, others: float) -> float:
        """Return how long what takes so long alone takes beside so many others that compute."""
        return seconds * (1.0 + self.crowding * others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run's requests: first tokens in seconds, by request, and how many starts there were."""

    first_token_seconds: Sequence[float]
    starts: int

    @property
    def mean_seconds(self) -> float:
        """Over all requests."""
        return sum(self.first_token_seconds) / len(self.first_token_seconds)


async def calibrate() -> Constants:
    """Measure the constants on a cluster of its own."""
    rates, overheads, firsts, tokens = [], [], [], []
    sizes = [SIZES_MB[place] for place in CALIBRATED]
    async with real_cluster("calibration", SHAPE, local=sizes, far=(), keep_alive_seconds=1.0) as running:
        for model in running.models:
            for kind in ("disk", "dram"):
                await running.until_quiet()
                start = await running.start(model, kind)
                weights_seconds = start.measured.weights_seconds if kind == "disk" else 0.0
                overheads.append(start.measured_seconds - weights_seconds)
                if kind == "disk":
                    rates.append(model.weight_bytes / weights_seconds)
            began = time.monotonic()
            first_seconds, last_seconds = await ask(running, model.name, OUTPUT_TOKENS)
            firsts.append(first_seconds - began)
            tokens.append((last_seconds - first_seconds) / (OUTPUT_TOKENS - 1))
        crowded = [await crowd(running) for _ in range(CROWDS)]
    crowding = (median(crowded) / median(firsts) - 1.0) / (len(CALIBRATED) - 1)
    return Constants(
        disk_bytes_per_second=median(rates),
        overhead_seconds=median(overheads),
        first_token_seconds=median(firsts),
        token_seconds=median(tokens),
        crowding=max(0.0, crowding),
    )


async def crowd(running: RealCluster) -> float:
    """Return the mean time to the first token when all models, warm, are asked at once."""

    async def first(name: str) -> float:
        began = time.monotonic()
        return (await ask(running, name, OUTPUT_TOKENS))[0] - began

    names = [model.name for model in running.models]
    await asyncio.gather(*map(first, names))  # starts them
    return sum(await asyncio.gather(*map(first, names))) / len(names)


async def ask(running: RealCluster, name: str, output_tokens: int) -> tuple[float, float]:
    """Stream an answer; return when its first and its last token came, on the monotonic clock."""
    first_seconds = 0.0
    answer = running.admin.complete(
        name, "the quick brown fox", max_tokens=output_tokens, timeout_seconds=PATIENCE_SECONDS
    )
    async for event in answer:
        if not first_seconds and (event.text or event.HasField("usage")):
            first_seconds = time.monotonic()
    return first_seconds or time.monotonic(), time.monotonic()


async def run_real(requests: Sequence[Request]) -> Run:
    """Send the requests when they are due."""
    async with real_cluster(
        "real", SHAPE, local=SIZES_MB, far=(), keep_alive_seconds=KEEP_ALIVE_SECONDS
    ) as running:
        await running.until_quiet()
        began = time.monotonic()

        async def send(request: Request) -> float:
            await asyncio.sleep(max(0.0, began + request.arrival_seconds - time.monotonic()))
            sent_seconds = time.monotonic()
            return (await ask(running, request.model, request.output_tokens))[0] - sent_seconds

        async with asyncio.TaskGroup() as tasks:
            sent = [tasks.create_task(send(request)) for request in requests]
        starts = 0
        for model in running.models:
            starts += sum(
                bool(found.replica_id) for found in await running.admin.explain(model.name, limit=1000)
            )
        return Run(first_token_seconds=[task.result() for task in sent], starts=starts)


def run_simulated(requests: Sequence[Request], models: Sequence[ModelSpec], known: Constants) -> Run:
    """Predict the same run."""
    typical_bytes = sum(model.weight_bytes for model in models) / len(models)
    device = DeviceSpec(
        kind="cpu",
        memory_bytes=64 * GB,
        memory_bytes_per_second=typical_bytes / (MEMORY_SHARE * known.token_seconds),
        operations_per_second=1e18,
        bus_bytes_per_second=1e12,
    )
    host = NodeSpec(
        device=device,
        device_count=SHAPE.devices,
        dram_bytes=SHAPE.pool_bytes,
        disk_bytes=100 * GB,
        disk_bytes_per_second=known.disk_bytes_per_second,
        network_bytes_per_second=SHAPE.network_bytes_per_second,
        overhead_seconds=known.overhead_seconds,
    )
    runs: list[Run] = []

    def keep(world: World) -> None:
        spans = [(session.started_seconds or 0.0, session.ends_seconds) for session in world.sessions]
        waited = [
            session.wait_seconds + extra_seconds(began, session.wait_seconds, spans, known)
            for session, (began, _) in zip(world.sessions, spans, strict=True)
        ]
        runs.append(Run(first_token_seconds=waited, starts=world.counters.starts))

    simulate(["locality"], [host] * SHAPE.nodes, models, requests, seed=1, then=keep)
    return runs[0]


def extra_seconds(
    began_seconds: float, wait_seconds: float, spans: Sequence[tuple[float, float]], known: Constants
) -> float:
    """Return what a session that began then takes to its first token beside its simulated wait.

    The first token itself, and what it and the end of a start take longer because others compute meanwhile.
    """
    first_seconds = known.first_token_seconds
    beside = others(began_seconds, began_seconds + first_seconds, spans)
    seconds = known.crowded_seconds(first_seconds, beside)
    if wait_seconds >= known.overhead_seconds:  # it waited for a start
        beside = others(began_seconds - known.overhead_seconds, began_seconds, spans)
        seconds += known.crowded_seconds(known.overhead_seconds, beside) - known.overhead_seconds
    return seconds


def others(from_seconds: float, until_seconds: float, spans: Sequence[tuple[float, float]]) -> float:
    """Return how many other sessions compute in this time, on average; the session itself began in it."""
    overlaps = (max(0.0, min(ended, until_seconds) - max(began, from_seconds)) for began, ended in spans)
    own_seconds = until_seconds - from_seconds if any(began == from_seconds for began, _ in spans) else 0.0
    return max(0.0, sum(overlaps) - own_seconds) / (until_seconds - from_seconds)


def spec_of(name: str, weight_bytes: int) -> ModelSpec:
    """Return a model as the simulator sees it."""
    return ModelSpec(
        name=ModelName(name),
        weight_bytes=weight_bytes,
        parameters=weight_bytes // 4,
        kv_bytes_per_token=0,
        concurrency=8,
        max_replicas=1,
        keep_alive_seconds=KEEP_ALIVE_SECONDS,
    )


def main() -> int:
    """Run the command; 0 = target met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=positive_float, default=90.0, help="length of the run")
    parser.add_argument("--requests-per-second", type=positive_float, default=0.7, help="over all models")
    parser.add_argument("--seed", type=not_negative, default=1, help="of the arrivals")
    options = parser.parse_args()
    print_heading("the real system beside its simulation")
    known = asyncio.run(calibrate())
    print(
        f"calibrated: disk {known.disk_bytes_per_second / 1e6:.1f} MB/s, a start "
        f"{known.overhead_seconds:.3f} s beside its bytes, "
        f"warm first token {known.first_token_seconds:.3f} s, then "
        f"{1000 * known.token_seconds:.1f} ms a token; each further session beside it adds "
        f"{known.crowding:.0%} to a first token",
        flush=True,
    )
    names = [f"local-{megabytes}-{place}" for place, megabytes in enumerate(SIZES_MB)]
    requests = gamma_requests(
        [ModelName(name) for name in names],
        requests_per_second=options.requests_per_second,
        seconds=options.seconds,
        cv=CV,
        lengths=Lengths.constant(5, OUTPUT_TOKENS),
        seed=options.seed,
        popularity=[1 / (rank + 1) for rank in range(len(names))],
    )
    models = [
        spec_of(name, small_model_bytes(megabytes)) for name, megabytes in zip(names, SIZES_MB, strict=True)
    ]
    real = asyncio.run(run_real(requests))
    simulated = run_simulated(requests, models, known)
    print(f"{'':12}requests  starts   mean start-up")
    for name, run in (("real", real), ("simulated", simulated)):
        print(f"{name:<12}{len(run.first_token_seconds):8}{run.starts:8}{run.mean_seconds:14.3f} s")
    error = abs(simulated.mean_seconds - real.mean_seconds) / real.mean_seconds
    met = error <= TARGET
    print(
        f"{'met' if met else 'MISSED'}: mean start-up {real.mean_seconds:.3f} s, simulated "
        f"{simulated.mean_seconds:.3f} s, off by {error:.0%} (target {TARGET:.0%})"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
