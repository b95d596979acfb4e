"""The table of `loading.py`, and its figures beside their targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loading_results import Sitting, cpu_of, speed_of, wall_of

from stoker.units import GB

TARGET_OF_FIO = 0.95
TARGET_OVER_MMAP = 1.6
TARGET_CPU_SHARE = 0.2
TARGET_CACHED_OVER_DIRECT = 3.0
TARGET_ATTACH_SECONDS = 0.010
TARGET_VERIFY_SHARE = 0.10

FIO = "fio"
LOOP = "preadv_loop"
CACHED_DIRECT = "direct_though_cached"
STOKER = "stoker"
ATTACH = "attach"
LIMITS = ((FIO, "limit"), (LOOP, "limit, pool's size"), (CACHED_DIRECT, "limit"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: As printed and chosen by `--rows`.
        loader: Name in `loading_rows.ROWS`.
        file: The file it reads; its page cache is what cold and warm are about.
        folder: What it is told to load.
        ours: Runs with this python.
        pool: Loads into the daemon's pool.
        recheck: The daemon has to check all digests, as on the first load.
        memory: `pool` or `own`, and what else one should know.
    """

    name: str
    loader: str
    file: Path
    folder: Path
    ours: bool = False
    pool: bool = False
    recheck: bool = False
    memory: str = "own"


def limit_of(sitting: Sitting) -> str:
    """Return what rows are compared with: fio, or the loop where there is no fio."""
    return FIO if FIO in sitting.names(cold=True) else LOOP


def print_table(sitting: Sitting, rows: Sequence[Row]) -> None:
    """Print one line per row, cold beside warm."""
    for number, part in enumerate(sitting.parts, start=1):
        print(f"# part {number}: {part}")
    head = f"{'wall s':>8}{'CPU s':>8}{'GB/s':>8}{'of limit':>10}"
    print(f"\n{'':<22}{'cold':>34}{'warm':>34}\n{'':<22}{head}{head}{'rounds':>8}  memory")
    for name, memory in [*LIMITS, *((row.name, row.memory) for row in rows)]:
        if name in sitting.missing:
            print(f"{name:<22}  not run: {sitting.missing[name]}")
        elif name in sitting.names(cold=True) | sitting.names(cold=False):
            cells = _cells(sitting, name, cold=True) + _cells(sitting, name, cold=False)
            count = max(len(sitting.values(name, "wall_seconds", cold=cold)) for cold in (True, False))
            print(f"{name:<22}{cells}{count:8}  {memory}")


def _cells(sitting: Sitting, name: str, *, cold: bool) -> str:
    if name not in sitting.names(cold=cold):
        return " " * 34
    return (
        f"{sitting.median(name, 'wall_seconds', cold=cold):8.3f}"
        f"{sitting.median(name, 'cpu_seconds', cold=cold):8.3f}{sitting.speed(name, cold=cold) / GB:8.2f}"
        f"{sitting.ratio(name, limit_of(sitting), speed_of, cold=cold):10.2f}"
    )


def judge(sitting: Sitting, rows: Sequence[Row]) -> bool:
    """Print each target beside its figure; return whether all are met. Ratios are medians over rounds."""
    cold = sitting.names(cold=True)
    limit = limit_of(sitting)
    peers = [row.name for row in rows if not row.ours and row.name in cold]
    checks: list[tuple[str, bool]] = []

    def at_least(what: str, figure: float, target: float) -> None:
        checks.append((f"{what} {figure:.2f} (>= {target:g})", figure >= target))

    def at_most(what: str, figure: float, target: float) -> None:
        checks.append((f"{what} {figure:.3g} (<= {target:g})", figure <= target))

    at_least(f"cold, of {limit}", sitting.ratio(STOKER, limit, speed_of, cold=True), TARGET_OF_FIO)
    if peers:
        faster = {peer: sitting.ratio(peer, STOKER, wall_of, cold=True) for peer in peers}
        leaner = {peer: sitting.ratio(STOKER, peer, cpu_of, cold=True) for peer in peers}
        fastest, leanest = min(faster, key=faster.__getitem__), max(leaner, key=leaner.__getitem__)
        at_least(f"cold, over the fastest peer ({fastest})", faster[fastest], 1.0)
        if "safetensors_mmap" in peers:
            at_least("cold, over safetensors mmap", faster["safetensors_mmap"], TARGET_OVER_MMAP)
        at_most(f"CPU, of the leanest peer ({leanest})", leaner[leanest], TARGET_CPU_SHARE)
    if CACHED_DIRECT in sitting.names(cold=False):
        at_least(
            "cached, over direct I/O on the cached file",
            sitting.ratio(STOKER, CACHED_DIRECT, speed_of, cold=False),
            TARGET_CACHED_OVER_DIRECT,
        )
    if "stoker_first" in cold:
        share = sitting.ratio("stoker_first", STOKER, wall_of, cold=True) - 1
        at_most("checking all digests, of a cold load", share, TARGET_VERIFY_SHARE)
    if ATTACH in sitting.names(cold=False):
        attach_seconds = sitting.median(ATTACH, "attach_seconds", cold=False)
        at_most("attach, seconds", attach_seconds, TARGET_ATTACH_SECONDS)
        touched = sitting.median(ATTACH, "wall_seconds", cold=False)
        print(f"\nattach of a fresh process and a byte of every page: {touched * 1000:.1f} ms")
    met = all(held for _, held in checks)
    print(
        f"{'met' if met else 'MISSED'}: "
        + "; ".join(f"{'' if held else 'NOT '}{text}" for text, held in checks)
    )
    return met
