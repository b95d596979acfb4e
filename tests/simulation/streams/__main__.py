"""`python -m tests.simulation.streams --seeds N`: many fault schedules; exit 0 = every one holds."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

import structlog

from tests.simulation.streams.schedules import Schedule, play


async def main() -> int:
    """Play the schedules of many seeds; write those that fail as files which the tests play from then on."""
    options = argparse.ArgumentParser(prog="python -m tests.simulation.streams", description=__doc__)
    options.add_argument("--seeds", type=int, default=10_000, help="how many")
    options.add_argument("--first", type=int, default=0, help="the first of them")
    options.add_argument("--write", type=Path, help="folder for the schedules that fail")
    told = options.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    failed = hops = moves = 0
    for seed in range(told.first, told.first + told.seeds):
        schedule = Schedule.of(seed)
        outcome = await play(schedule)
        hops, moves = hops + outcome.hops, moves + outcome.moves
        if outcome.wrong:
            failed += 1
            where = f"; written to {schedule.write(told.write, outcome)}" if told.write else ""
            sys.stdout.write(f"seed {seed}: {outcome.wrong}{where}\n")
    sys.stdout.write(f"{failed} of {told.seeds} schedules fail (target 0); {hops} hops, {moves} moves\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
