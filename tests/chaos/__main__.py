"""`python -m tests.chaos`: streams under faults on real processes; exit 0 = nothing lost, changed, leaked."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.faults import KINDS
from tests.chaos.storm import Account, Weather, brew
from tests.integration.tiny_model import make_tiny_model

SHOWN = 5


def main() -> int:
    """Run a storm and print its account; the last line is the figure beside its target."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    weather, keep = _weather()
    _say(f"chaos: {weather}")
    _say(f"machine: {platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        model = make_tiny_model(Path(folder) / "model")
        account = asyncio.run(brew(weather, model, Path(folder) / "c", _say))
        if keep is not None:
            shutil.copytree(Path(folder) / "c" / "logs", keep)
    _print(account)
    return 0 if account.is_good else 1


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _weather() -> tuple[Weather, Path | None]:
    usual = Weather()
    options = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    options.add_argument("--seconds", type=float, default=usual.seconds, help="load and faults together")
    options.add_argument("--streams", type=int, default=usual.streams, help="open at a time")
    options.add_argument("--nodes", type=int, default=usual.nodes)
    options.add_argument(
        "--every", type=float, default=usual.every_seconds, help="seconds from fault to fault"
    )
    options.add_argument("--seed", type=int, default=usual.seed, help="of requests and faults")
    options.add_argument("--requests", type=int, default=usual.requests, help="distinct ones")
    options.add_argument("--tokens", type=int, default=usual.tokens, help="of an answer, at most")
    options.add_argument("--kinds", nargs="*", metavar="KIND", default=list(usual.kinds))
    options.add_argument("--rolling", action="store_true", help="then every service is replaced in turn")
    options.add_argument("--keep", type=Path, help="new folder for the logs of all processes")
    told = options.parse_args()
    if unknown := sorted(set(told.kinds) - set(KINDS)):
        options.error(f"no such faults: {unknown}; there are {sorted(KINDS)} (none: --kinds)")
    counts = (told.streams, told.requests, told.tokens, told.nodes - 1)
    if min(told.seconds, told.every) <= 0 or min(counts) < 1:
        options.error("seconds, every, streams, requests and tokens are above 0, nodes at least 2")
    weather = Weather(
        seconds=told.seconds,
        streams=told.streams,
        nodes=told.nodes,
        every_seconds=told.every,
        seed=told.seed,
        requests=told.requests,
        tokens=told.tokens,
        kinds=tuple(told.kinds),
        rolling=told.rolling,
    )
    return weather, told.keep


def _print(account: Account) -> None:
    tally = account.tally
    _say("faults: " + ", ".join(f"{count} {kind}" for kind, count in sorted(account.faults.items())))
    if tally.reasons:
        _say(f"refused: {dict(tally.reasons)}")
    for title, found in (
        ("lost", tally.lost),
        ("changed", tally.changed),
        ("not whole again", account.broken),
        ("leaked", account.leaked),
    ):
        for line in found[:SHOWN]:
            _say(f"{title}: {line}")
    _say(
        f"lost {len(tally.lost)} (target 0), changed {len(tally.changed)} (0), not whole again "
        f"{len(account.broken)} (0), leaked {len(account.leaked)} (0); {tally.streams} streams, "
        f"{tally.tokens} tokens, {account.faults.total()} faults in {account.seconds:.0f} s; "
        f"{tally.refusals} tries refused before they began, then served"
    )


if __name__ == "__main__":
    sys.exit(main())
