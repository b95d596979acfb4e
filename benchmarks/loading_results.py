"""What `loading.py` measured, round by round, and the file that joins the parts of one sitting.

A round measures the limit and Stoker's own row beside whatever else it measures, so every ratio is taken
within a round and the parts may hold different rows. Pure, but for `read` and `write`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setting import median

Answer = dict[str, float]
"""Figures of one load, by name."""


@dataclass(slots=True, kw_only=True)
class Round:
    """Loads that were measured one right after the other.

    Attributes:
        cold: By row, no page of any form in the page cache.
        warm: By row, all of the row's file in the page cache.
    """

    cold: dict[str, Answer] = field(default_factory=dict)
    warm: dict[str, Answer] = field(default_factory=dict)

    def of(self, *, cold: bool) -> dict[str, Answer]:
        """Return one half."""
        return self.cold if cold else self.warm


@dataclass(slots=True, kw_only=True)
class Sitting:
    """All rounds on one checkpoint and one machine.

    Attributes:
        size: Of the checkpoint, as named on the command line.
        machine: In a line.
        parts: What was run: its command and the pool's pages.
        rounds: Of all parts.
        missing: Rows that cannot run here, with the reason.
    """

    size: str
    machine: str
    parts: list[str] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def names(self, *, cold: bool) -> set[str]:
        """Return the rows that have figures."""
        return {name for each in self.rounds for name in each.of(cold=cold)}

    def values(self, name: str, figure: str, *, cold: bool) -> list[float]:
        """Return a figure of a row in every round that has it."""
        halves = (each.of(cold=cold) for each in self.rounds)
        return [half[name][figure] for half in halves if name in half]

    def median(self, name: str, figure: str, *, cold: bool) -> float:
        """Return the median of a figure over the rounds."""
        return median(self.values(name, figure, cold=cold))

    def speed(self, name: str, *, cold: bool) -> float:
        """Return median bytes per second."""
        return median([speed_of(half[name]) for half in self._halves([name], cold=cold)])

    def ratio(self, above: str, below: str, of: Callable[[Answer], float], *, cold: bool) -> float:
        """Return the median of a ratio taken within each round that has both rows."""
        halves = self._halves([above, below], cold=cold)
        return median([of(half[above]) / of(half[below]) for half in halves])

    def _halves(self, names: Sequence[str], *, cold: bool) -> Iterable[dict[str, Answer]]:
        return [half for each in self.rounds if all(name in (half := each.of(cold=cold)) for name in names)]


def speed_of(answer: Answer) -> float:
    """Return bytes per second."""
    return answer["tensor_bytes"] / answer["wall_seconds"]


def wall_of(answer: Answer) -> float:
    """Return seconds."""
    return answer["wall_seconds"]


def cpu_of(answer: Answer) -> float:
    """Return processor seconds."""
    return answer["cpu_seconds"]


def read(path: Path | None, *, size: str, machine: str) -> Sitting:
    """Return what a file holds, or an empty sitting where there is none.

    Raises:
        SystemExit: It is of another checkpoint or machine: figures of two are never joined.
    """
    if path is None or not path.exists():
        return Sitting(size=size, machine=machine)
    found: dict[str, Any] = json.loads(path.read_text())
    if (found["size"], found["machine"]) != (size, machine):
        raise SystemExit(
            f"{path.name} holds figures of {found['size']} GB on {found['machine']}; name another file"
        )
    rounds = [Round(**each) for each in found["rounds"]]
    return Sitting(size=size, machine=machine, parts=found["parts"], rounds=rounds, missing=found["missing"])


def write(path: Path, sitting: Sitting) -> None:
    """Keep a sitting, whole or not at all."""
    content = {
        "size": sitting.size,
        "machine": sitting.machine,
        "parts": sitting.parts,
        "missing": sitting.missing,
        "rounds": [{"cold": each.cold, "warm": each.warm} for each in sitting.rounds],
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)
