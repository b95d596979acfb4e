"""Sorted items whose changed copies share all but one short run with the one before. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import itemgetter
from typing import Generic, Self, TypeVar

Item = TypeVar("Item", bound=str | tuple[float, str])
"""What is sorted: an id, or a number and an id."""

RUN = 64
"""Items per run at most: a change copies one run and the list of runs, √n each at 4,096 items."""
_last = itemgetter(-1)


class Ladder(Generic[Item]):
    """Items in ascending order, each once; equal to another one with the same items.

    Never changed once it is made; no frozen dataclass, because every event makes several.
    """

    __slots__ = ("runs",)

    def __init__(self, runs: tuple[tuple[Item, ...], ...] = ()) -> None:
        self.runs = runs

    @classmethod
    def of(cls, items: Iterable[Item]) -> Self:
        """Return a ladder of these items."""
        ordered = sorted(items)
        return cls(tuple(tuple(ordered[at : at + RUN]) for at in range(0, len(ordered), RUN)))

    def __iter__(self) -> Iterator[Item]:
        return chain.from_iterable(self.runs)

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def __bool__(self) -> bool:
        return bool(self.runs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ladder) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # equal ladders may be cut differently; none is a key

    @property
    def first(self) -> Item:
        """The lowest item; IndexError where there is none."""
        return self.runs[0][0]

    @property
    def last(self) -> Item:
        """The highest item; IndexError where there is none."""
        return self.runs[-1][-1]

    def added(self, item: Item) -> Ladder[Item]:
        """Return the ladder with an item that is not in it."""
        runs = self.runs
        if not runs:
            return Ladder(((item,),))
        at = min(bisect_left(runs, item, key=_last), len(runs) - 1)
        run = runs[at]
        place = bisect_left(run, item)
        run = (*run[:place], item, *run[place:])
        cut = (run,) if len(run) <= RUN else (run[: RUN // 2], run[RUN // 2 :])
        return Ladder((*runs[:at], *cut, *runs[at + 1 :]))

    def removed(self, item: Item) -> Ladder[Item]:
        """Return the ladder without an item; as it is where that is not in it."""
        runs = self.runs
        at = bisect_left(runs, item, key=_last)
        if at == len(runs):
            return self
        run = runs[at]
        place = bisect_left(run, item)
        if run[place] != item:
            return self
        run = run[:place] + run[place + 1 :]
        return Ladder((*runs[:at], *((run,) if run else ()), *runs[at + 1 :]))


def item_added(items: tuple[Item, ...], item: Item) -> tuple[Item, ...]:
    """Return a short sorted tuple with one more item."""
    place = bisect_left(items, item)
    return (*items[:place], item, *items[place:])


def item_removed(items: tuple[Item, ...], item: Item) -> tuple[Item, ...]:
    """Return a short sorted tuple without an item, if it is in it."""
    place = bisect_left(items, item)
    if place < len(items) and items[place] == item:
        return items[:place] + items[place + 1 :]
    return items
