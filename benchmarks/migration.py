"""What a client sees of a planned move, and of a crash: pauses against the stream's own time between tokens.

    python benchmarks/migration.py [--parts ship replay crash drain] [--moves 10] [--lengths 128 1024 4096]
                                   [--kills 3] [--silences 1] [--streams 4] [--model FOLDER]

Two nodes on this machine, a replica of the model on each. One stream per context length moves from node to
node while it is read (`stoker migrate REQUEST --to NODE`); its pause is the longest gap between two tokens
from the order to the switch, the stream's own time is the median gap between moves; `own worst` is the
longest of those gaps, which no move caused. Tokens that have no text (`textless`) look like gaps to a client,
so prompts are such that answers have none. The same with keys and values switched off
(`--set gateway.ship_kv=false`), where the destination computes them. Then replicas are killed under streams,
and a node is stopped without a word: the time to the next token, in parts, beside what it would take to send
the request again (restart from scratch), or with the answer so far as a longer prompt (re-prefill). At last
a node is drained under several streams of the first length, for which another replica must be started.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from arguments import not_negative, positive
from crashes import TARGET_DETECTION_SECONDS, measure_crashes, report_crashes
from drains import measure_drain, report_drain
from moving_streams import Cluster, Settings, body, gaps, mean_of, percentile, reading, two_nodes
from setting import MODEL_DIR, ROOT, median, print_heading

from stoker.errors import StokerError

TARGET_P50, TARGET_P99 = 2.0, 4.0
NO_SHIPPING: Settings = (("gateway", "ship_kv", "false"),)
PHASES = ("find", "ship", "compute", "switch")
PARTS = ("ship", "replay", "crash", "drain")


@dataclass(slots=True)
class Moves:
    """Moves of one stream."""

    context_tokens: int
    step_seconds: float = 0.0
    """The stream's own time between tokens: the median between moves."""
    worst_step_seconds: float = 0.0
    """The longest of them."""
    textless_tokens: int = 0
    """More tokens than the client saw pieces of text; one more may have been on its way when it left."""
    pauses_seconds: list[float] = field(default_factory=list)
    lines: list[dict[str, object]] = field(default_factory=list)
    """The gateway's canonical lines."""

    @property
    def ratios(self) -> list[float]:
        """Each pause against the stream's own time."""
        return [pause / self.step_seconds for pause in self.pauses_seconds]


async def measure_moves(name: str, chosen: argparse.Namespace, settings: Settings = ()) -> list[Moves]:
    """Return the moves of a stream per length."""
    async with two_nodes(name, chosen.model, settings) as on:
        return [await moves_of_a_stream(on, length, chosen) for length in chosen.lengths]


async def moves_of_a_stream(on: Cluster, context_tokens: int, chosen: argparse.Namespace) -> Moves:
    """Move one stream back and forth while it is read."""
    found = Moves(context_tokens)
    windows: list[tuple[float, float]] = []
    async with reading(on, body(context_tokens, chosen.tokens, context_tokens)) as stream:
        await stream.until(chosen.between)
        at = (await on.running_replica()).node_id
        nodes = {"node-1": "node-2", "node-2": "node-1"}
        for _ in range(chosen.moves):
            done = len(on.lines("session.moved"))
            began_seconds = time.monotonic()
            await on.admin.migrate(stream.result.request_id, nodes[at])
            async with asyncio.timeout(120):
                while len(on.lines("session.moved")) == done:  # noqa: ASYNC110 - a benchmark
                    await asyncio.sleep(0.02)
            await stream.until(stream.tokens + 1)
            windows.append((began_seconds, time.monotonic()))
            at = nodes[at]
            await stream.until(stream.tokens + chosen.between)
            found.lines.append(on.lines("session.moved")[-1])
        request_id = stream.result.request_id
    made = int(str((await on.finished(request_id))["completion_tokens"]))
    found.textless_tokens = max(0, made - stream.tokens)
    own, found.pauses_seconds = gaps(stream.result.token_times_seconds, windows)
    found.step_seconds, found.worst_step_seconds = median(own), max(own)
    return found


def report_moves(title: str, found: Sequence[Moves]) -> bool:
    """Print a table; tell whether the targets are met at every length."""
    print(title)
    print(
        "  context  step ms  pause ms P50   P99  ratio P50   P99  own worst  path    switch s  shipped MB"
        "  recomputed  textless"
    )
    met = True
    for moves in found:
        p50, p99 = median(moves.ratios), percentile(moves.ratios, 0.99)
        met = met and p50 <= TARGET_P50 and p99 <= TARGET_P99
        paths = {str(line["path"]) for line in moves.lines}
        print(
            f"  {mean_of(moves.lines, 'tokens'):7.0f}  {moves.step_seconds * 1e3:7.1f}"
            f"  {median(moves.pauses_seconds) * 1e3:12.1f}"
            f" {percentile(moves.pauses_seconds, 0.99) * 1e3:5.0f}  {p50:9.2f} {p99:5.2f}"
            f"  {moves.worst_step_seconds / moves.step_seconds:9.2f}  {'+'.join(paths):6}"
            f"  {median([float(str(line['seconds'])) for line in moves.lines]):8.2f}"
            f"  {mean_of(moves.lines, 'shipped_bytes') / 1e6:10.1f}"
            f"  {mean_of(moves.lines, 'recomputed_tokens'):10.1f}  {moves.textless_tokens:8d}",
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


def options() -> argparse.Namespace:
    """Return the command line's choices."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--moves", type=positive, default=10, help="moves per stream")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[128, 1024, 4096], help="prompt tokens, about"
    )
    parser.add_argument("--kills", type=positive, default=3, help="of workers")
    parser.add_argument("--silences", type=not_negative, default=1, help="of nodes; 0 = none")
    parser.add_argument("--streams", type=positive, default=4, help="of the node that is drained")
    parser.add_argument(
        "--tokens",
        type=positive,
        default=2000,
        help="longest answer; a stream is left once it has moved enough",
    )
    parser.add_argument("--between", type=positive, default=12, help="tokens before, between and after moves")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    return parser.parse_args()


def main() -> int:
    """Measure and report; the exit status says whether all targets are met."""
    chosen = options()
    print_heading("planned moves and crashes, as a client sees them")
    for name in ("ship", "replay", "kill", "drain"):
        shutil.rmtree(ROOT / ".data" / f"bench-migration-{name}", ignore_errors=True)
    targets_met: list[bool] = []
    told: list[str] = []
    try:
        for part, title, settings in (
            ("ship", "keys and values shipped", ()),
            ("replay", "computed from the tokens", NO_SHIPPING),
        ):
            if part not in chosen.parts:
                continue
            found = asyncio.run(measure_moves(f"migration-{part}", chosen, settings))
            met = report_moves(title, found)
            if part == "ship":
                ratios = [ratio for moves in found for ratio in moves.ratios]
                targets_met.append(met)
                told.append(
                    f"pause of a planned move: P50 {median(ratios):.2f} (target {TARGET_P50:g}), "
                    f"P99 {percentile(ratios, 0.99):.2f} (target {TARGET_P99:g}) of the time between tokens"
                )
        if "crash" in chosen.parts:
            crashes = asyncio.run(
                measure_crashes(chosen.model, chosen.lengths[0], chosen.kills, chosen.silences)
            )
            targets_met.append(report_crashes(crashes))
            told.append(
                f"detection {median([crash.detection for crash in crashes.killed]) * 1e3:.0f} ms "
                f"(target {TARGET_DETECTION_SECONDS * 1e3:.0f})"
            )
        if "drain" in chosen.parts:
            drain = asyncio.run(measure_drain(chosen.model, chosen.lengths[0], chosen.streams))
            targets_met.append(median(drain.ratios) <= TARGET_P50 and max(drain.ratios) <= TARGET_P99)
            told.append(report_drain(drain))
    except StokerError as error:
        print(f"failed: {error.message}", file=sys.stderr)
        return 2
    verdict = "met" if all(targets_met) else "missed"
    print(f"\n{'; '.join(told) or 'no target here'}: {verdict}")
    return 0 if all(targets_met) else 1


if __name__ == "__main__":
    sys.exit(main())
