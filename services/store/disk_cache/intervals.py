"""Which bytes of a file are there. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class Intervals:
    """A set of bytes, as disjoint ranges in order; not thread safe."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, begin: int, end: int) -> None:
        """Add the bytes `begin` … `end`; touching ranges become one."""
        if begin >= end:
            return
        first, last = bisect_left(self._ends, begin), bisect_right(self._begins, end)
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last] = [begin]
        self._ends[first:last] = [end]

    def remove(self, begin: int, end: int) -> None:
        """Take the bytes `begin` … `end` out."""
        kept = [
            piece for low, high in self.ranges() for piece in ((low, min(high, begin)), (max(low, end), high))
        ]
        self._begins, self._ends = [], []
        for low, high in kept:
            self.add(low, high)

    def covers(self, begin: int, end: int) -> bool:
        """Tell whether all bytes `begin` … `end` are there."""
        if begin >= end:
            return True
        at = bisect_right(self._begins, begin) - 1
        return at >= 0 and self._ends[at] >= end

    def ranges(self) -> list[tuple[int, int]]:
        """Return the ranges in order."""
        return list(zip(self._begins, self._ends, strict=True))

    def total(self) -> int:
        """Return how many bytes are there."""
        return sum(self._ends) - sum(self._begins)
