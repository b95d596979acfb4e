"""What clients see of a drain, for `migration.py`: all streams of a node go to a replica started for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from moving_streams import Cluster, Stream, body, gaps, mean_of, reading, two_nodes
from setting import median

from stoker.units import MIB
from stoker.v1.controller_pb2 import NODE_SCHEDULING_DRAINED

KV_CACHE_BYTES = 1024 * MIB
"""Of a replica: four sessions of 4,000 tokens of 45 KiB, and some more."""
TOKENS = 600
"""Longest answer; a stream is left once it has moved."""
BETWEEN = 16
"""Tokens of each stream before and after, from which its own time between tokens is known."""
LIMIT_SECONDS = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """One drain of a node."""

    step_seconds: float
    """The streams' own time between tokens, all of them in one batch."""
    ready_seconds: float
    """From the order until another replica was ready."""
    moved_seconds: float
    """From the order until the last stream had moved."""
    pauses_seconds: Sequence[float]
    """Each stream's longest gap in that time."""
    lines: Sequence[dict[str, object]]
    """The gateway's canonical lines."""

    @property
    def ratios(self) -> list[float]:
        """Each stream's longest gap against its own time between tokens."""
        return [pause / self.step_seconds for pause in self.pauses_seconds]


async def measure_drain(folder: Path, context_tokens: int, streams: int) -> Drain:
    """Drain the node that runs all streams."""
    async with (
        two_nodes("migration-drain", folder, replicas=1, kv_cache_bytes=KV_CACHE_BYTES) as on,
        AsyncExitStack() as stack,
    ):
        opened = [
            await stack.enter_async_context(reading(on, body(context_tokens, TOKENS, number)))
            for number in range(streams)
        ]
        for stream in opened:
            await stream.until(1, LIMIT_SECONDS)
        begun_seconds = time.monotonic()  # all prefills are over: from now on steps are alike
        await _further(opened)
        source = await on.running_replica()
        ordered_seconds = time.monotonic()
        await on.admin.set_node_scheduling(source.node_id, NODE_SCHEDULING_DRAINED)
        ready = asyncio.create_task(_ready_elsewhere(on, source.node_id))
        async with asyncio.timeout(LIMIT_SECONDS):
            while len(on.lines("session.moved")) < streams:  # noqa: ASYNC110 - a benchmark
                await asyncio.sleep(0.02)
            moved_seconds = time.monotonic()
            await _further(opened)
            ready_seconds = await ready
        times = [
            [when for when in stream.result.token_times_seconds if when >= begun_seconds] for stream in opened
        ]
        found = [gaps(each, [(ordered_seconds, moved_seconds)]) for each in times]
        return Drain(
            step_seconds=median([gap for own, _ in found for gap in own]),
            ready_seconds=ready_seconds - ordered_seconds,
            moved_seconds=moved_seconds - ordered_seconds,
            pauses_seconds=[longest for _, (longest,) in found],
            lines=on.lines("session.moved"),
        )


async def _further(opened: Sequence[Stream]) -> None:
    """Wait for some tokens of each stream."""
    for stream, tokens in [(stream, stream.tokens) for stream in opened]:
        await stream.until(tokens + BETWEEN, LIMIT_SECONDS)


async def _ready_elsewhere(on: Cluster, node_id: str) -> float:
    """Return when a replica on another node was ready."""
    while not any(replica.node_id != node_id for replica in await on.replicas()):  # noqa: ASYNC110 - a benchmark
        await asyncio.sleep(0.02)
    return time.monotonic()


def report_drain(found: Drain) -> str:
    """Print the parts; return the figure of the last line."""
    step_seconds, ratios, tokens = found.step_seconds, found.ratios, mean_of(found.lines, "tokens")
    switches = [float(str(line["pause_seconds"])) / step_seconds for line in found.lines]
    print(f"\na drain of {len(ratios)} streams of {tokens:.0f} tokens, steps of {step_seconds * 1e3:.0f} ms")
    print(f"  a replica ready after {found.ready_seconds:.1f} s, all moved after {found.moved_seconds:.1f} s")
    print(
        f"  by: {' '.join(str(line['path']) for line in found.lines)}; "
        f"shipped {sum(float(str(line['shipped_bytes'])) for line in found.lines) / 1e6:.0f} MB, "
        f"computed {mean_of(found.lines, 'recomputed_tokens'):.1f} tokens each"
    )
    print(f"  longest gap of each, of a step: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    print(f"  at the switch (gateway's view): {', '.join(f'{ratio:.2f}' for ratio in switches)}", flush=True)
    return f"drain: {median(ratios):.2f} steps, worst {max(ratios):.2f}, after {found.moved_seconds:.1f} s"
