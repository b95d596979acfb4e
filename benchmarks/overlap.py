"""Execution while loading: the first token of a cold model with and without it, on a disk made slow.

    python benchmarks/overlap.py [--starts 5] [--read-mb-per-second 250]

Two clusters of the same build, starts alternating: in one the workers take sessions at once and the first
forward pass waits for each layer's weights; in the other (`STOKER_WORKER_EXECUTE_WHILE_LOADING=false`) it
begins when all weights are there. The store's reads are limited by the kernel (cgroup; needs root), the page
cache is dropped before each start.

The ideal is a first token one layer and the head after the last byte. What can be won is the forward pass,
*hidden* the part of it that was: (without - with) / prefill without. Target: at least half of it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from arguments import positive
from cold_start import stoker_start
from setting import MODEL_DIR, cluster, median, print_heading
from slow_disk import children_running, slow_disk

from stoker.v1 import model_pb2

TARGET_HIDDEN = 0.5
SETTING = "STOKER_WORKER_EXECUTE_WHILE_LOADING"
Starts = list[tuple[float, dict[str, float]]]


async def measure(starts: int, folder: Path, read_bytes_per_second: int) -> tuple[Starts, Starts]:
    """Return first tokens and stages with execution while loading, and without."""
    overlapped: Starts = []
    plain: Starts = []
    os.environ[SETTING] = "true"
    async with cluster("overlap-on") as with_it:
        os.environ[SETTING] = "false"
        async with cluster("overlap-off") as without:
            for _, admin in (with_it, without):
                spec = model_pb2.ModelSpec(name="m", checkpoint_uri=str(folder), keep_alive_seconds=0.2)
                await admin.deploy(spec)
            stores = children_running("services.store")
            with slow_disk(folder, read_bytes_per_second=read_bytes_per_second, process_ids=stores):
                for _ in range(starts):
                    for (running, admin), found in ((with_it, overlapped), (without, plain)):
                        found.append(await stoker_start(running, admin, "m", folder, from_disk=True))
    return overlapped, plain


def report(overlapped: Starts, plain: Starts) -> bool:
    """Print the table; return whether the target is met."""
    print("medians, ms        first token   weights   prefill   overlap     stall")
    for name, found in (("with", overlapped), ("without", plain)):
        stages = {
            stage: median([1000 * parts[stage] for _, parts in found])
            for stage in ("weights", "prefill", "overlap", "stall")
        }
        first = median([1000 * seconds for seconds, _ in found])
        figures = "".join(f"{value:10.0f}" for value in stages.values())
        print(f"  {name:<12} {first:15.0f}{figures}")
    with_seconds = median([seconds for seconds, _ in overlapped])
    without_seconds = median([seconds for seconds, _ in plain])
    hidden = (without_seconds - with_seconds) / median([parts["prefill"] for _, parts in plain])
    met = hidden >= TARGET_HIDDEN
    print(
        f"{'met' if met else 'MISSED'}: first token {without_seconds / with_seconds:.2f}x sooner, "
        f"{hidden:.0%} of the forward pass hidden behind the load (target {TARGET_HIDDEN:.0%})"
    )
    return met


def main() -> int:
    """Run the command; 0 = target met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=positive, default=5, help="cold starts of each kind")
    parser.add_argument(
        "--read-mb-per-second", type=positive, default=250, help="what the disk is slowed down to"
    )
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="folder; default: the demo's model")
    arguments = parser.parse_args()
    folder = arguments.model.resolve()
    if not (folder / "config.json").exists():
        raise SystemExit(f"no model in {folder}: run `make model` first")
    print_heading("execution while loading")
    bytes_per_second = arguments.read_mb_per_second * 10**6
    return 0 if report(*asyncio.run(measure(arguments.starts, folder, bytes_per_second))) else 1


if __name__ == "__main__":
    sys.exit(main())
