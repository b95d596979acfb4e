"""What a client sees of a crash, for `migration.py`: workers killed, nodes fallen silent, sending again."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moving_streams import Cluster, body, reading, two_nodes
from setting import median, stream_chat

TARGET_DETECTION_SECONDS = 0.1
LEASE_SECONDS = 5.0
"""`node_timeout_seconds` of the controller: a node that is silent for longer is taken to be gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """From a death to the client's next token, in seconds."""

    total: float
    detection: float
    placement: float
    replay: float
    tokens: int
    unreachable: float = 0.0
    """Until the controller took the node to be gone; 0 = it was not the node that died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crashes:
    """What was measured in one cluster."""

    context_tokens: int
    killed: Sequence[Crash]
    silent: Sequence[Crash]
    scratch_seconds: float
    """The same request sent again, to the token after the one the crash came at."""
    prefill_seconds: float
    """The same with the answer so far as part of the prompt, to its first token."""


async def measure_crashes(folder: Path, context_tokens: int, kills: int, silences: int) -> Crashes:
    """Kill workers under streams, stop nodes, and send the request again."""
    async with two_nodes("migration-kill", folder) as on:
        killed = [await _crash(on, context_tokens, number) for number in range(kills)]
        scratch, prefill = await _sent_again(on, context_tokens, killed[-1].tokens)
        silent = [await _crash(on, context_tokens, 500 + number, is_node=True) for number in range(silences)]
        return Crashes(
            context_tokens=context_tokens,
            killed=killed,
            silent=silent,
            scratch_seconds=scratch,
            prefill_seconds=prefill,
        )


async def _crash(on: Cluster, context_tokens: int, number: int, *, is_node: bool = False) -> Crash:
    """Kill the worker under a stream, or stop its node without a word until the stream goes on."""
    await on.until_ready()
    done = len(on.lines("session.resumed"))
    async with reading(on, body(context_tokens, 64, 1000 + number)) as stream:
        await stream.until(16)
        victim = await on.running_replica()
        pids = _node_of(victim.worker_pid) if is_node else [victim.worker_pid]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP if is_node else signal.SIGKILL)
        began_seconds, tokens = time.monotonic(), stream.tokens
        unreachable = 0.0
        try:
            async with asyncio.timeout(120):
                while is_node and await on.is_reachable(victim.node_id):  # noqa: ASYNC110 - a benchmark
                    await asyncio.sleep(0.01)
                unreachable = time.monotonic() - began_seconds if is_node else 0.0
                while len(on.lines("session.resumed")) == done:  # noqa: ASYNC110 - a benchmark
                    await asyncio.sleep(0.005)
        finally:
            for pid in pids if is_node else ():
                os.kill(pid, signal.SIGCONT)
        line = on.lines("session.resumed")[-1]
        await stream.task
    # Tokens that were on their way when it died still came: the next one is the first after the longest gap.
    after = [when for when in stream.result.token_times_seconds if when > began_seconds]
    times = [began_seconds, *after]
    total = max((late - early, late) for early, late in itertools.pairwise(times))[1] - began_seconds
    placement, replay = float(str(line["search_seconds"])), float(str(line["replay_seconds"]))
    return Crash(
        total=total,
        detection=max(0.0, total - placement - replay),
        placement=placement,
        replay=replay,
        tokens=tokens,
        unreachable=unreachable,
    )


def _node_of(worker_pid: int) -> list[int]:
    """Return the processes of a worker's node that carry tokens: its agent, the worker, what forked it."""
    pids = [worker_pid]
    while b"services.node_agent" not in Path(f"/proc/{pids[-1]}/cmdline").read_bytes():
        stat = Path(f"/proc/{pids[-1]}/stat").read_text()
        pids.append(int(stat.rpartition(")")[2].split()[1]))
    return pids[::-1]


async def _sent_again(on: Cluster, context_tokens: int, tokens: int) -> tuple[float, float]:
    """Return how long the request takes to so many tokens anew, and to its first with a longer prompt."""
    await on.until_ready()
    again = await stream_chat(on.running.rest_url, body(context_tokens, tokens + 1, 77))
    longer = await stream_chat(on.running.rest_url, body(context_tokens + tokens, 1, 78))
    return again.token_times_seconds[-1] - again.sent_seconds, longer.first_token_seconds


def report_crashes(found: Crashes) -> bool:
    """Print the parts; tell whether both kinds of death are noticed in time."""
    tokens = found.killed[-1].tokens
    print(f"\nunder a stream of about {found.context_tokens} prompt and {tokens} output tokens, ms")
    for title, crashes in (("worker killed", found.killed), ("node silent", found.silent)):
        if not crashes:
            continue
        print(f"  {title}, {len(crashes)} times")
        for name in ("detection", "placement", "replay", "total"):
            values = [getattr(crash, name) * 1e3 for crash in crashes]
            print(f"    {name:10} median {median(values):8.1f}  worst {max(values):8.1f}")
    print(
        f"  restart from scratch: {found.scratch_seconds * 1e3:.0f} to the same token; "
        f"re-prefill: {found.prefill_seconds * 1e3:.0f}",
        flush=True,
    )
    unreachable = max((crash.unreachable for crash in found.silent), default=0.0)
    if found.silent:
        print(f"  silent node out of the routes after {unreachable:.2f} s at most (lease {LEASE_SECONDS:g})")
    return median([crash.detection for crash in found.killed]) <= TARGET_DETECTION_SECONDS
