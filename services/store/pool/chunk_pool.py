"""Which chunks are free. Pure: no memory, only numbers.

A checkpoint takes any free chunks, so nothing ever fragments. Preferred, in this order: chunks whose pages
are already there, then neighbours (one mapping per run in every process that attaches), then low numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise


class ChunkPool:
    """The free chunks of an arena of `total` chunks."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = set(range(total))
        self._cold = set(range(total))

    @property
    def free_count(self) -> int:
        """Chunks that can be taken now."""
        return len(self._free)

    def mark_faulted_in(self, chunks: Iterable[int]) -> None:
        """Remember that these chunks' pages are there."""
        self._cold.difference_update(chunks)

    def take(self, count: int) -> tuple[int, ...]:
        """Take `count` chunks, in the order they should be filled.

        Raises:
            ValueError: Fewer are free; the caller decides what to drop before it asks.
        """
        if count > len(self._free):
            raise ValueError(f"{count} chunks of {len(self._free)} free ones")
        warm = _longest_runs_first(self._free - self._cold, count)
        chosen = warm[:count] + sorted(self._free & self._cold)[: max(0, count - len(warm))]
        self._free.difference_update(chosen)
        self._cold.difference_update(chosen)  # being written is as good as faulted in
        return tuple(chosen)

    def give_back(self, chunks: Iterable[int]) -> None:
        """Make chunks free again.

        Raises:
            ValueError: One of them is free already, or no chunk.
        """
        given = set(chunks)
        if given & self._free or not all(0 <= chunk < self.total for chunk in given):
            raise ValueError(f"not taken: {sorted(given & self._free)[:8]}")
        self._free |= given


def _longest_runs_first(chunks: set[int], wanted: int) -> list[int]:
    """Return the chunks so that a prefix of `wanted` has few runs: the tightest fit, or the longest first."""
    runs = _runs(sorted(chunks))
    fitting = [run for run in runs if len(run) >= wanted]
    if fitting:
        return min(fitting, key=len)
    return [chunk for run in sorted(runs, key=len, reverse=True) for chunk in run]


def _runs(ordered: list[int]) -> list[list[int]]:
    if not ordered:
        return []
    runs = [[ordered[0]]]
    for before, chunk in pairwise(ordered):
        if chunk == before + 1:
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return runs
