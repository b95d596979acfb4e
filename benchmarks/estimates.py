"""Are estimates honest? Predicted and measured start-up of real cold starts, stage by stage.

    python benchmarks/estimates.py [--rounds 2]

`stoker up --nodes 4 --devices 2` with disks and networks made slow, and random models of several sizes that
the script makes. One start at a time: from a node's disk, from its memory, from an HTTP origin, from another
node, from the copy on its own disk; at the end two at once, one of which finds no warm worker. Each start is
compared with the estimate that placed it. Nothing is left out, the very first starts neither.

Targets: median error <= 20 %, 90th percentile <= 50 %.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from arguments import positive
from real_cluster import RealCluster, Shape, Start, real_cluster
from setting import print_heading

TARGET_MEDIAN = 0.20
TARGET_P90 = 0.50
LOCAL_MB = (16, 48, 96)
FAR_MB = (32, 64)


async def measure(rounds: int) -> list[Start]:
    """Return all starts, in order."""
    async with real_cluster("estimates", Shape(), local=LOCAL_MB, far=FAR_MB) as running:
        for number in range(rounds):
            await one_round(running, has_hurry=number == rounds - 1)
        return running.starts


async def one_round(running: RealCluster, *, has_hurry: bool) -> None:
    """Start every model from every tier it can come from."""
    node_ids = await running.node_ids()
    for model in running.models:
        await running.drop(model, copies=True)
        if not model.far:
            await settled_start(running, model, "disk")
            await settled_start(running, model, "dram")
            continue
        first = await settled_start(running, model, "remote")
        await running.only([node_id for node_id in node_ids if node_id != first.node_id])
        await settled_start(running, model, "peer")
        await running.only([first.node_id])
        await running.drop(model)
        await settled_start(running, model, "copy")
        await running.only([])
    if has_hurry:
        await running.until_quiet()
        await running.only(node_ids[:1])
        await asyncio.gather(*(running.start(model, "no worker") for model in running.models[:2]))
        await running.only([])


async def settled_start(running: RealCluster, model: object, kind: str) -> Start:
    """Start a model when nothing else runs; prints the stages."""
    await running.until_quiet()
    return show(await running.start(model, kind))  # type: ignore[arg-type]


def show(start: Start) -> Start:
    """Print a start's stages, predicted and measured."""
    predicted, measured = start.predicted, start.measured
    print(
        f"{start.kind:<10}{start.model:<12}{start.node_id:<8}"
        f"{start.predicted_seconds:8.3f}{start.measured_seconds:8.3f}{start.error_ratio:7.0%}"
        f"{predicted.worker_seconds:9.3f}{measured.worker_seconds:7.3f}"
        f"{predicted.load_seconds:9.3f}{measured.weights_seconds:7.3f}"
        f"{predicted.skeleton_seconds:9.3f}{measured.skeleton_seconds:7.3f}"
        f"{predicted.overhead_seconds:9.3f}{unexplained_seconds(start):7.3f}",
        flush=True,
    )
    return start


def unexplained_seconds(start: Start) -> float:
    """Return what no stage of a start explains."""
    measured = start.measured
    explained = measured.worker_seconds + max(
        measured.weights_seconds,
        measured.skeleton_seconds + measured.first_forward_seconds,
    )
    return max(0.0, start.measured_seconds - explained)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * share // 1).__int__() - 1))]


def main() -> int:
    """Run the command; 0 = both targets met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=2, help="of all models and tiers")
    rounds = parser.parse_args().rounds
    print_heading("estimates beside measured starts")
    print("                                 total s           error    worker s        weights s")
    print("from      model       node      pred.   meas.            pred.  meas.    pred.  meas.")
    starts = asyncio.run(measure(rounds))
    errors = [start.error_ratio for start in starts]
    middle, tail = percentile(errors, 0.5), percentile(errors, 0.9)
    met = middle <= TARGET_MEDIAN and tail <= TARGET_P90
    print(
        f"{'met' if met else 'MISSED'}: {len(errors)} starts, error {middle:.0%} in the median (target "
        f"{TARGET_MEDIAN:.0%}), {tail:.0%} at the 90th percentile (target {TARGET_P90:.0%})"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
