"""What `migration.py` measures with: a cluster with a replica on each node, its log, streams read beside."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from setting import ROOT, StreamResult, cluster, stream_chat

from stoker.client import AsyncClient
from stoker.client.connection import LocalCluster
from stoker.units import MIB
from stoker.v1 import model_pb2, node_agent_pb2

MODEL = "m"
READY = node_agent_pb2.REPLICA_STATE_READY
KV_CACHE_BYTES = 512 * MIB
"""Of a replica: SmolLM2's longest context, 8,192 tokens of 45 KiB in float32, and some more."""
Settings = tuple[tuple[str, str, str], ...]


@dataclass(slots=True)
class Cluster:
    """Two nodes, and the gateway's log."""

    running: LocalCluster
    admin: AsyncClient
    log: Path

    def lines(self, event: str) -> list[dict[str, object]]:
        """Return the gateway's log lines of one event so far."""
        lines = (line for line in self.log.read_text().splitlines() if f'"{event}"' in line)
        return [found for line in lines if (found := json.loads(line)).get("event") == event]

    async def until_ready(self, count: int = 2) -> None:
        """Wait until so many replicas have all their weights."""
        async with asyncio.timeout(180):
            while len(await self.replicas()) < count:  # noqa: ASYNC110 - a benchmark
                await asyncio.sleep(0.1)

    async def finished(self, request_id: str) -> dict[str, object]:
        """Return the gateway's line of a request that ends, once it is there."""
        async with asyncio.timeout(60):
            while True:
                for line in self.lines("request.finished"):
                    if line["request_id"] == request_id:
                        return line
                await asyncio.sleep(0.02)

    async def replicas(self) -> list[node_agent_pb2.Replica]:
        """Return those that serve."""
        found = await self.admin.replicas(MODEL)
        return [replica for replica in found if replica.state == READY and not replica.loading]

    async def running_replica(self) -> node_agent_pb2.Replica:
        """Return the replica that streams now."""
        async with asyncio.timeout(60):
            while True:
                for replica in await self.replicas():
                    if replica.running_sessions:
                        return replica
                await asyncio.sleep(0.02)

    async def is_reachable(self, node_id: str) -> bool:
        """Tell whether the controller hears of a node."""
        return any(node.report.node_id == node_id and node.reachable for node in await self.admin.nodes())


@asynccontextmanager
async def two_nodes(
    name: str,
    folder: Path,
    settings: Settings = (),
    *,
    replicas: int = 2,
    kv_cache_bytes: int = KV_CACHE_BYTES,
) -> AsyncIterator[Cluster]:
    """Run two nodes with a replica of the model on each, or on one of them."""
    async with cluster(name, node_count=2, devices=1, settings=settings) as (running, admin):
        await admin.deploy(
            model_pb2.ModelSpec(
                name=MODEL,
                checkpoint_uri=str(folder),
                keep_alive_seconds=-1,
                min_replicas=replicas,
                max_replicas=replicas,
                kv_cache_bytes=kv_cache_bytes,
            )
        )
        on = Cluster(running, admin, ROOT / ".data" / f"bench-{name}" / "logs" / "gateway.log")
        await on.until_ready(replicas)
        yield on


def body(context_tokens: int, tokens: int, seed: int) -> dict[str, object]:
    """Return a request of about so many prompt tokens."""
    return {
        "model": MODEL,
        "messages": [
            {"role": "user", "content": f"{seed} " + "the quick brown fox " * (context_tokens // 4)}
        ],
        "max_tokens": tokens,
        # Tokens without text would look like gaps: sampled half letters, the end of an answer that goes on.
        "temperature": 0.0,
        "min_tokens": tokens,
        "seed": seed,
    }


@dataclass(slots=True, kw_only=True)
class Stream:
    """A stream that is read beside what is done to it."""

    task: asyncio.Task[StreamResult]
    result: StreamResult = field(repr=False)

    @property
    def tokens(self) -> int:
        """Return how many have come."""
        return len(self.result.token_times_seconds)

    async def until(self, tokens: int, limit_seconds: float = 240.0) -> None:
        """Wait until so many tokens have come.

        Raises:
            RuntimeError: The stream ended before.
            TimeoutError: They did not come in time.
        """
        async with asyncio.timeout(limit_seconds):
            while self.tokens < tokens:
                if self.task.done():
                    self.task.result()
                    raise RuntimeError(f"a stream ended after {self.tokens} tokens")
                await asyncio.sleep(0.005)


@asynccontextmanager
async def reading(on: Cluster, request: dict[str, object]) -> AsyncIterator[Stream]:
    """Send a request and read its answer; the stream is left at the end of the block."""
    result = StreamResult(sent_seconds=time.monotonic())
    task = asyncio.create_task(stream_chat(on.running.rest_url, request, result))
    try:
        yield Stream(task=task, result=result)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def gaps(times: Sequence[float], windows: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the gaps outside of all windows, and the longest gap that ends in each window."""
    longest = [0.0] * len(windows)
    own: list[float] = []
    for before, after in itertools.pairwise(times):
        inside = [number for number, (begin, end) in enumerate(windows) if begin <= after <= end]
        for number in inside:
            longest[number] = max(longest[number], after - before)
        if not inside:
            own.append(after - before)
    return own, longest


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def mean_of(lines: Sequence[dict[str, object]], key: str) -> float:
    """Return the mean of a number in log lines."""
    return statistics.mean(float(str(line[key])) for line in lines)
