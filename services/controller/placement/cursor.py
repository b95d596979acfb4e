"""How far a search has read the sorted lists of the index, and which of two it reads next.

A cursor is changed as it is read; it lives for one decision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from services.controller.placement.options import Rank
from stoker.ids import NodeId

Run = tuple[tuple[float, NodeId], ...]
Runs = tuple[Run, ...]
"""A list as a `Ladder` keeps it: no run is empty."""
_SECONDS: Final = 4
"""Where a rank has its seconds."""


class Cursor:
    """How far a list has been read; its runs are read where they lie."""

    __slots__ = ("_at", "_buffer", "_later", "_runs", "reached")

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._later = 1
        """The first run not read yet."""
        self._buffer = runs[0] if runs else ()
        self._at = 0
        self.reached = self._buffer[0][0] if self._buffer else 0.0
        """The number of the next row, which no later one is below."""

    @property
    def rows_left(self) -> bool:
        """Tell whether there is a next row."""
        return self._has(1)

    @property
    def next_id(self) -> NodeId:
        """The next row's node; IndexError where there is none."""
        return self._buffer[self._at][1]

    def skip_equal(self) -> None:
        """Go on to the first row with another number."""
        reached = self.reached
        while self._has(1) and self._buffer[self._at][0] == reached:
            self._at += 1
        self.read(0)

    def ahead(self, count: int) -> float:
        """Return what would be reached `count` rows further; what is reached now where the list ends."""
        at, buffer = self._at + count, self._buffer
        if at < len(buffer):
            return buffer[at][0]
        if self._has(count + 1):
            return self._buffer[self._at + count][0]
        return self._buffer[-1][0] if self._at < len(self._buffer) else self.reached

    def read(self, count: int) -> Run:
        """Return the next rows, at most `count`."""
        at, buffer = self._at, self._buffer
        if at + count < len(buffer):
            self._at = at + count
            self.reached = buffer[at + count][0]
            return buffer[at : at + count]
        self._has(count + 1)
        rows = self._buffer[self._at : self._at + count]
        self._at += len(rows)
        if self._at < len(self._buffer):
            self.reached = self._buffer[self._at][0]
        elif rows:
            self.reached = rows[-1][0]
        return rows

    def _has(self, count: int) -> bool:
        """Tell whether there are so many more rows, which are in the buffer then."""
        while self._at + count > len(self._buffer):
            if self._later >= len(self._runs):
                return False
            self._buffer = (*self._buffer[self._at :], *self._runs[self._later])
            self._at = 0
            self._later += 1
        return True


def next_reached(
    rates: Cursor, others: Cursor, count: int, beyond: Callable[[float, float], Rank]
) -> tuple[Cursor, Rank]:
    """Return the list to read `count` rows of, and the rank that no node behind them beats.

    Args:
        rates: Nodes by negative rate.
        others: The same ones by another number that costs.
        count: Rows that are read next.
        beyond: Returns the rank that nodes of at most a rate, and no less of the other number, can't beat.
    """
    by_rate = beyond(-rates.ahead(count), others.reached)
    by_other = beyond(-rates.reached, others.ahead(count))
    return (others, by_other) if by_other[_SECONDS] > by_rate[_SECONDS] else (rates, by_rate)
