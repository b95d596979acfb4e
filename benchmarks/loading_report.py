"""The table of `loading.py`, and its figures beside their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from setting import median

from stoker.units import GB

TARGET_OF_FIO = 0.95
TARGET_OVER_MMAP = 1.6
TARGET_CPU_SHARE = 0.2
TARGET_CACHED_OVER_DIRECT = 3.0
TARGET_ATTACH_SECONDS = 0.010
TARGET_VERIFY_SHARE = 0.10

Figures = dict[tuple[str, bool], list[dict[str, float]]]
"""Answers by row name and whether it was cold."""


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


def of(figures: Figures, name: str, field: str, *, cold: bool) -> float:
    """Return the median of a figure."""
    return median([answer[field] for answer in figures[name, cold]])


def rate(figures: Figures, name: str, *, cold: bool) -> float:
    """Return median bytes per second."""
    return median([answer["tensor_bytes"] / answer["wall_seconds"] for answer in figures[name, cold]])


def print_table(figures: Figures, rows: Sequence[Row], missing: Mapping[str, str]) -> None:
    """Print one line per row, cold beside warm."""
    head = f"{'wall s':>8}{'CPU s':>8}{'GB/s':>8}{'of limit':>10}"
    print(f"{'':<22}{'cold':>34}{'warm':>34}\n{'':<22}{head}{head}  memory")
    limit = "fio" if ("fio", True) in figures else "preadv_loop"
    lines = [("fio", "limit"), ("preadv_loop", "limit, pool's size"), ("direct_though_cached", "limit")]
    for name, memory in [*lines, *((row.name, row.memory) for row in rows)]:
        if name in missing:
            print(f"{name:<22}  not run: {missing[name]}")
            continue
        cells = ""
        for cold in (True, False):
            if (name, cold) not in figures:
                cells += " " * 34
                continue
            speed = rate(figures, name, cold=cold)
            cells += (
                f"{of(figures, name, 'wall_seconds', cold=cold):8.3f}"
                f"{of(figures, name, 'cpu_seconds', cold=cold):8.3f}{speed / GB:8.2f}"
                f"{speed / rate(figures, limit, cold=cold):10.2f}"
            )
        print(f"{name:<22}{cells}  {memory}")


def judge(figures: Figures, rows: Sequence[Row], attaches: Sequence[dict[str, float]]) -> bool:
    """Print each target beside its figure; return whether all are met."""
    limit = "fio" if ("fio", True) in figures else "preadv_loop"
    peers = [row.name for row in rows if not row.ours and (row.name, True) in figures]
    wall = {name: of(figures, name, "wall_seconds", cold=True) for name in ["stoker", *peers]}
    cpu = {name: of(figures, name, "cpu_seconds", cold=True) for name in ["stoker", *peers]}
    checks: list[tuple[str, float, float, bool]] = []

    def at_least(what: str, figure: float, target: float) -> None:
        checks.append((f"{what} {figure:.2f} (>= {target:g})", figure, target, figure >= target))

    def at_most(what: str, figure: float, target: float) -> None:
        checks.append((f"{what} {figure:.3g} (<= {target:g})", figure, target, figure <= target))

    at_least(
        f"cold, of {limit}",
        rate(figures, "stoker", cold=True) / rate(figures, limit, cold=True),
        TARGET_OF_FIO,
    )
    if peers:
        fastest = min(peers, key=wall.__getitem__)
        leanest = min(peers, key=cpu.__getitem__)
        at_least(f"cold, over the fastest peer ({fastest})", wall[fastest] / wall["stoker"], 1.0)
        at_most(f"CPU, of the leanest peer ({leanest})", cpu["stoker"] / cpu[leanest], TARGET_CPU_SHARE)
    if "safetensors_mmap" in peers:
        at_least("cold, over safetensors mmap", wall["safetensors_mmap"] / wall["stoker"], TARGET_OVER_MMAP)
    at_least(
        "cached, over direct I/O on the cached file",
        rate(figures, "stoker", cold=False) / rate(figures, "direct_though_cached", cold=False),
        TARGET_CACHED_OVER_DIRECT,
    )
    if ("stoker_first", True) in figures:
        pairs = zip(figures["stoker_first", True], figures["stoker", True], strict=True)
        share = median([first["wall_seconds"] / later["wall_seconds"] for first, later in pairs]) - 1
        at_most("checking all digests, of a cold load", share, TARGET_VERIFY_SHARE)
    at_most(
        "attach, seconds", median([answer["attach_seconds"] for answer in attaches]), TARGET_ATTACH_SECONDS
    )
    print(f"\nattach of a fresh process and a byte of every page: "
          f"{median([answer['wall_seconds'] for answer in attaches]) * 1000:.1f} ms")  # fmt: skip
    met = all(held for *_, held in checks)
    print(
        f"{'met' if met else 'MISSED'}: "
        + "; ".join(f"{'' if held else 'NOT '}{text}" for text, _, _, held in checks)
    )
    return met
