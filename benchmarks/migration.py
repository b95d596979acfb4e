"""What a client sees of a planned move, and of a crash: pauses against the stream's own time between tokens.

    python benchmarks/migration.py [--moves 10] [--lengths 128 1024 4096] [--kills 3] [--model FOLDER]

Two nodes on this machine, a replica of the model on each. One stream per context length moves from node to
node while it is read (`stoker migrate REQUEST --to NODE`); its pause is the longest gap between two tokens
from the order to the switch, the stream's own time is the median gap between moves. The same with keys and
values switched off (`--set gateway.ship_kv=false`), where the destination computes them. Then replicas are
killed under streams: the time to the next token, in parts, beside what it would take to send the request
again (restart from scratch), or to send it again with the answer so far as a longer prompt (re-prefill).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from setting import MODEL_DIR, ROOT, StreamResult, cluster, median, print_heading, stream_chat

from stoker.client import AsyncClient
from stoker.client.connection import LocalCluster
from stoker.errors import StokerError
from stoker.v1 import model_pb2, node_agent_pb2

TARGET_P50, TARGET_P99 = 2.0, 4.0
TARGET_DETECTION_SECONDS = 0.1
Settings = tuple[tuple[str, str, str], ...]
NO_SHIPPING: Settings = (("gateway", "ship_kv", "false"),)
TOKENS_BETWEEN_MOVES = 12
PHASES = ("find", "ship", "compute", "switch")
MODEL = "m"
READY = node_agent_pb2.REPLICA_STATE_READY


@dataclass(slots=True)
class Moves:
    """Moves of one stream."""

    context_tokens: int
    step_seconds: float = 0.0
    """The stream's own time between tokens: the median between moves."""
    pauses_seconds: list[float] = field(default_factory=list)
    lines: list[dict[str, object]] = field(default_factory=list)
    """The gateway's canonical lines."""

    @property
    def ratios(self) -> list[float]:
        """Each pause against the stream's own time."""
        return [pause / self.step_seconds for pause in self.pauses_seconds]


class Cluster:
    """Two nodes with a replica each, and the gateway's log."""

    def __init__(self, name: str, running: LocalCluster, admin: AsyncClient) -> None:
        self.running, self.admin = running, admin
        self._log = ROOT / ".data" / f"bench-{name}" / "logs" / "gateway.log"

    def lines(self, event: str) -> list[dict[str, object]]:
        """Return the gateway's log lines of one event so far."""
        lines = (line for line in self._log.read_text().splitlines() if f'"{event}"' in line)
        return [found for line in lines if (found := json.loads(line)).get("event") == event]

    async def until_ready(self, count: int = 2) -> None:
        """Wait until so many replicas have all their weights."""
        async with asyncio.timeout(180):
            while len(await self.replicas()) < count:  # noqa: ASYNC110 - a benchmark
                await asyncio.sleep(0.1)

    async def replicas(self) -> list[node_agent_pb2.Replica]:
        """Return those that serve."""
        found = await self.admin.replicas(MODEL)
        return [replica for replica in found if replica.state == READY and not replica.loading]

    async def node_of_running(self) -> node_agent_pb2.Replica:
        """Return the replica that streams now."""
        async with asyncio.timeout(60):
            while True:
                for replica in await self.replicas():
                    if replica.running_sessions:
                        return replica
                await asyncio.sleep(0.02)


def body(context_tokens: int, tokens: int, seed: int) -> dict[str, object]:
    """Return a request of about so many prompt tokens."""
    return {
        "model": MODEL,
        "messages": [
            {"role": "user", "content": f"{seed} " + "the quick brown fox " * (context_tokens // 4)}
        ],
        "max_tokens": tokens,
        "temperature": 0.0,  # repeats the words: sampled half letters would look like gaps
        "seed": seed,
        "ignore_eos": True,
    }


async def until_tokens(stream: asyncio.Task[StreamResult], result: StreamResult, count: int) -> None:
    """Wait until a stream has so many tokens.

    Raises:
        RuntimeError: It ended before.
    """
    async with asyncio.timeout(240):
        while len(result.token_times_seconds) < count:
            if stream.done():
                stream.result()
                raise RuntimeError(f"a stream ended after {len(result.token_times_seconds)} tokens")
            await asyncio.sleep(0.005)


async def moves_of_a_stream(on: Cluster, context_tokens: int, moves: int, tokens: int) -> Moves:
    """Move one stream back and forth while it is read."""
    found, result = Moves(context_tokens), StreamResult(sent_seconds=time.monotonic())
    stream = asyncio.create_task(
        stream_chat(on.running.rest_url, body(context_tokens, tokens, context_tokens), result)
    )
    windows: list[tuple[float, float]] = []
    try:
        await until_tokens(stream, result, TOKENS_BETWEEN_MOVES)
        at = (await on.node_of_running()).node_id
        nodes = {"node-1": "node-2", "node-2": "node-1"}
        for _ in range(moves):
            done = len(on.lines("session.moved"))
            began_seconds = time.monotonic()
            await on.admin.migrate(result.request_id, nodes[at])
            async with asyncio.timeout(120):
                while len(on.lines("session.moved")) == done:  # noqa: ASYNC110 - a benchmark
                    await asyncio.sleep(0.02)
            await until_tokens(stream, result, len(result.token_times_seconds) + 1)
            windows.append((began_seconds, time.monotonic()))
            at = nodes[at]
            await until_tokens(stream, result, len(result.token_times_seconds) + TOKENS_BETWEEN_MOVES)
            found.lines.append(on.lines("session.moved")[-1])
    finally:
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
    found.step_seconds, found.pauses_seconds = gaps(result.token_times_seconds, windows)
    return found


def gaps(times: Sequence[float], windows: Sequence[tuple[float, float]]) -> tuple[float, list[float]]:
    """Return the median gap outside of all windows, and the longest gap that ends in each window."""
    longest = [0.0] * len(windows)
    own: list[float] = []
    for before, after in itertools.pairwise(times):
        inside = [number for number, (begin, end) in enumerate(windows) if begin <= after <= end]
        for number in inside:
            longest[number] = max(longest[number], after - before)
        if not inside:
            own.append(after - before)
    return median(own), longest


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """From the death of a replica's worker to the client's next token, in seconds."""

    total: float
    detection: float
    placement: float
    replay: float
    tokens: int


async def kill_of_a_stream(on: Cluster, context_tokens: int, number: int) -> Kill:
    """Kill the worker under a stream."""
    await on.until_ready()
    result, done = StreamResult(sent_seconds=time.monotonic()), len(on.lines("session.resumed"))
    stream = asyncio.create_task(
        stream_chat(on.running.rest_url, body(context_tokens, 64, 1000 + number), result)
    )
    try:
        await until_tokens(stream, result, 16)
        victim = await on.node_of_running()
        os.kill(victim.worker_pid, signal.SIGKILL)
        killed_seconds, tokens = time.monotonic(), len(result.token_times_seconds)
        async with asyncio.timeout(120):
            while len(on.lines("session.resumed")) == done:  # noqa: ASYNC110 - a benchmark
                await asyncio.sleep(0.005)
        line = on.lines("session.resumed")[-1]
        await stream
    finally:
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
    # Tokens that were on their way when it died still came: the next one is the first after the longest gap.
    after = [when for when in result.token_times_seconds if when > killed_seconds]
    times = [killed_seconds, *after]
    total = max((late - early, late) for early, late in itertools.pairwise(times))[1] - killed_seconds
    placement, replay = float(str(line["search_seconds"])), float(str(line["replay_seconds"]))
    return Kill(
        total=total,
        detection=max(0.0, total - placement - replay),
        placement=placement,
        replay=replay,
        tokens=tokens,
    )


async def sent_again(on: Cluster, context_tokens: int, tokens: int) -> tuple[float, float]:
    """Return how long the request takes to so many tokens anew, and to its first with a longer prompt."""
    await on.until_ready()
    again = await stream_chat(on.running.rest_url, body(context_tokens, tokens + 1, 77))
    longer = await stream_chat(on.running.rest_url, body(context_tokens + tokens, 1, 78))
    return again.token_times_seconds[-1] - again.sent_seconds, longer.first_token_seconds


async def measure_moves(  # noqa: PLR0913, PLR0917 - the parameters of a run
    name: str, folder: Path, lengths: Sequence[int], moves: int, tokens: int, settings: Settings = ()
) -> list[Moves]:
    """Return the moves of a stream per length."""
    async with cluster(name, node_count=2, devices=1, settings=settings) as (running, admin):
        on = await deployed(name, running, admin, folder)
        return [await moves_of_a_stream(on, length, moves, tokens) for length in lengths]


async def measure_kills(
    name: str, folder: Path, context_tokens: int, kills: int
) -> tuple[list[Kill], float, float]:
    """Return what kills cost, and what sending the request again would."""
    async with cluster(name, node_count=2, devices=1) as (running, admin):
        on = await deployed(name, running, admin, folder)
        found = [await kill_of_a_stream(on, context_tokens, number) for number in range(kills)]
        scratch, prefill = await sent_again(on, context_tokens, found[-1].tokens)
        return found, scratch, prefill


async def deployed(name: str, running: LocalCluster, admin: AsyncClient, folder: Path) -> Cluster:
    """Have a replica of the model on both nodes."""
    await admin.deploy(
        model_pb2.ModelSpec(
            name=MODEL, checkpoint_uri=str(folder), keep_alive_seconds=-1, min_replicas=2, max_replicas=2
        )
    )
    on = Cluster(name, running, admin)
    await on.until_ready()
    return on


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def report_moves(title: str, found: Sequence[Moves]) -> bool:
    """Print a table; tell whether the targets are met at every length."""
    print(title)
    print("  context  step ms  pause ms P50   P99  ratio P50   P99  path    switch s  shipped MB  recomputed")
    met = True
    for moves in found:
        p50, p99 = median(moves.ratios), percentile(moves.ratios, 0.99)
        met = met and p50 <= TARGET_P50 and p99 <= TARGET_P99
        tokens = statistics.mean(int(str(line["tokens"])) for line in moves.lines)
        paths = {str(line["path"]) for line in moves.lines}
        print(
            f"  {tokens:7.0f}  {moves.step_seconds * 1e3:7.1f}  {median(moves.pauses_seconds) * 1e3:12.1f}"
            f" {percentile(moves.pauses_seconds, 0.99) * 1e3:5.0f}  {p50:9.2f} {p99:5.2f}"
            f"  {'+'.join(paths):6}"
            f"  {median([float(str(line['seconds'])) for line in moves.lines]):8.2f}"
            f"  {statistics.mean(int(str(line['shipped_bytes'])) for line in moves.lines) / 1e6:10.1f}"
            f"  {statistics.mean(int(str(line['recomputed_tokens'])) for line in moves.lines):10.1f}",
            flush=True,
        )
    print("\n  longest gaps by the phase they ended in (gateway's view), of a step: median / worst")
    for moves in found:
        phases = [
            f"{phase} {median(ratios):.2f} / {max(ratios):.2f}"
            for phase in PHASES
            if (ratios := [phase_ratio(line, phase, moves.step_seconds) for line in moves.lines])
        ]
        print(f"  {int(str(moves.lines[0]['tokens'])):7d}  " + "   ".join(phases), flush=True)
    return met


def phase_ratio(line: dict[str, object], phase: str, step_seconds: float) -> float:
    """Return the longest gap of a move's phase against the stream's own time between tokens."""
    gaps = line["longest_gaps_seconds"]
    return float(gaps[phase]) / step_seconds if isinstance(gaps, dict) else 0.0


def report_kills(kills: Sequence[Kill], scratch: float, prefill: float, context_tokens: int) -> bool:
    """Print the parts; tell whether detection is in time."""
    print(
        f"\nworker killed under a stream of {context_tokens} prompt and {kills[-1].tokens} output tokens, ms"
    )
    for name in ("detection", "placement", "replay", "total"):
        values = [getattr(kill, name) * 1e3 for kill in kills]
        print(f"  {name:10} median {median(values):8.1f}  worst {max(values):8.1f}")
    print(
        f"  restart from scratch: {scratch * 1e3:.0f} to the same token; re-prefill: {prefill * 1e3:.0f}",
        flush=True,
    )
    return median([kill.detection for kill in kills]) <= TARGET_DETECTION_SECONDS


def main() -> int:
    """Measure and report; the exit status says whether all targets are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moves", type=int, default=10, help="moves per stream")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 1024, 4096], help="prompt tokens, about"
    )
    parser.add_argument("--kills", type=int, default=3, help="0 = none")
    parser.add_argument(
        "--tokens", type=int, default=2000, help="longest answer; a stream is left once it has moved enough"
    )
    parser.add_argument("--no-replay", action="store_true", help="leave the moves without shipping out")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    chosen = parser.parse_args()
    print_heading("planned moves and crashes, as a client sees them")
    for name in ("ship", "replay", "kill"):
        shutil.rmtree(ROOT / ".data" / f"bench-migration-{name}", ignore_errors=True)
    try:
        shipped = asyncio.run(
            measure_moves("migration-ship", chosen.model, chosen.lengths, chosen.moves, chosen.tokens)
        )
        met = report_moves("keys and values shipped", shipped)
        if not chosen.no_replay:
            replayed = asyncio.run(
                measure_moves(
                    "migration-replay", chosen.model, chosen.lengths, chosen.moves, chosen.tokens, NO_SHIPPING
                )
            )
            report_moves("computed from the tokens", replayed)
        detected, detection = True, "not measured"
        if chosen.kills:
            kills, scratch, prefill = asyncio.run(
                measure_kills("migration-kill", chosen.model, chosen.lengths[0], chosen.kills)
            )
            detected = report_kills(kills, scratch, prefill, chosen.lengths[0])
            detection = f"{median([kill.detection for kill in kills]) * 1e3:.0f} ms"
    except StokerError as error:
        print(f"failed: {error.message}", file=sys.stderr)
        return 2
    ratios = [ratio for moves in shipped for ratio in moves.ratios]
    print(
        f"\npause of a planned move: P50 {median(ratios):.2f} (target {TARGET_P50:g}), "
        f"P99 {percentile(ratios, 0.99):.2f} (target {TARGET_P99:g}) of the time between tokens; "
        f"detection {detection} (target {TARGET_DETECTION_SECONDS * 1e3:.0f} ms): "
        f"{'met' if met and detected else 'missed'}"
    )
    return 0 if met and detected else 1


if __name__ == "__main__":
    sys.exit(main())
