"""A rolling upgrade: every service in turn is stopped with SIGTERM and started again, under load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from tests.chaos.cluster import ChaosCluster, until

SETTLE_SECONDS = 1.0
TURN_SECONDS = 600.0
"""Longest wait within one service's turn: at a load of 24 on two cores a worker's imports took two minutes,
and a node's turn is over when its agent, a pre-started worker and a replica have come one after the other."""


async def roll(cluster: ChaosCluster, say: Callable[[str], None], *, one_of_each: bool = False) -> int:
    """Replace every service once, or one of each kind; return how many that were.

    Each is asked to stop, ends by itself (a gateway when its streams have ended, a node agent when they have
    moved), is started again and serves before the next one's turn.

    Raises:
        TimeoutError: One does not end, or does not come back.
    """
    titles = cluster.titles()
    if one_of_each:
        titles = list({title.partition(" of ")[0]: title for title in titles}.values())
    for title in titles:
        process = cluster.process(title)
        assert process is not None, title
        began = time.monotonic()
        process.terminate()
        await cluster.until_serving(title, not_pid=process.pid, limit_seconds=TURN_SECONDS)
        await cluster.until_open(limit_seconds=TURN_SECONDS)
        serves_seconds = time.monotonic() - began
        if title.startswith("node_agent"):
            await _until_served(cluster, title.removeprefix("node_agent of "))
        whole_seconds = time.monotonic() - began
        say(
            f"replaced {title} (pid {process.pid}): serves after {serves_seconds:.1f} s, "
            f"all is whole after {whole_seconds:.1f} s"
        )
        await asyncio.sleep(SETTLE_SECONDS)
    return len(titles)


async def _until_served(cluster: ChaosCluster, node: str) -> None:
    """Return when as many replicas are ready as before: the next node must find room for its streams."""

    async def is_served() -> bool:
        async with cluster.client() as client:
            ready = [each for each in await client.replicas() if each.ready_unix_seconds]
        return len(ready) >= len(cluster.nodes)

    await until(is_served, f"every replica is ready again after {node}", limit_seconds=TURN_SECONDS)
