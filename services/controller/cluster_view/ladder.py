"""Sorted items whose changed copies share all but one short run with the one before. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Generic, Self, TypeVar

Item = TypeVar("Item", bound=str | tuple[float, str])
"""What is sorted: an id, or a number and an id."""

RUN = 64
"""Items per run at most: a change copies one run and the list of runs, √n each at 4,096 items."""


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
        if not self.runs:
            return Ladder(((item,),))
        runs = list(self.runs)
        _add(runs, item)
        return Ladder(tuple(runs))

    def removed(self, item: Item) -> Ladder[Item]:
        """Return the ladder without an item; as it is where that is not in it."""
        runs = list(self.runs)
        return Ladder(tuple(runs)) if _remove(runs, item) else self

    def moved(self, was: Item, now: Item) -> Ladder[Item]:
        """Return the ladder with an item that is not in it in place of one that may be."""
        runs = list(self.runs)
        _remove(runs, was)
        if not runs:
            return Ladder(((now,),))
        _add(runs, now)
        return Ladder(tuple(runs))


def _add(runs: list[tuple[Item, ...]], item: Item) -> None:
    """Put an item into the run that it belongs to; there is one at least."""
    at = max(0, bisect_left(runs, (item,)) - 1)
    run = list(runs[at])
    run.insert(bisect_left(run, item), item)
    if len(run) > RUN:
        runs[at : at + 1] = (tuple(run[: RUN // 2]), tuple(run[RUN // 2 :]))
    else:
        runs[at] = tuple(run)


def _remove(runs: list[tuple[Item, ...]], item: Item) -> bool:
    """Take an item out of its run, and a run without items out of the runs; tell whether it was there."""
    at = bisect_left(runs, (item,))
    if at == len(runs) or runs[at][0] != item:
        at -= 1  # it is no run's first
    if at < 0:
        return False
    run = list(runs[at])
    place = bisect_left(run, item)
    if place == len(run) or run[place] != item:
        return False
    del run[place]
    if run:
        runs[at] = tuple(run)
    else:
        del runs[at]
    return True


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
