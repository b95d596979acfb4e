"""Nodes for a model, best first, in streams that can be left as soon as no later node can win. Pure.

Each stream gives nodes in ascending order of a bound (`bounds`) that none of its later nodes can beat, and in
between says how far it has come:

1. Nodes that have the checkpoint nearer than others, and those with a preferred label: by what they cost at
   least.
2. Open nodes with enough free slots, by rung (`places.Rung`), the fastest first. Where no worker waits, two
   lists are read, by rate and by the worker's time: unseen nodes take at least the rate of the one cursor and
   the worker of the other (Fagin's threshold algorithm, PODS '01). The next rows come from the list that
   raises this bound more by them.
3. Open nodes with idle replicas, likewise by rate and by worth.
4. Open nodes with busy replicas that may be moved or drained, the fastest first, at most
   `migration_candidates` of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from itertools import chain, dropwhile, islice
from typing import Final, NamedTuple

from services.controller.placement.bounds import Bounded, Bounds, rungs_of
from services.controller.placement.options import Rank
from services.controller.placement.room import Situation, Wanted
from stoker.ids import NodeId

NOBODY = NodeId("")
"""In place of a node: whatever the stream gives next is not below this rank."""
MOST_ROWS = 8
"""Rows of a list read between two looks at what those that follow cost at least."""
FEW_ROWS, MANY_ROWS = 2, 32
"""Rows taken from a list at first, and when they are used up."""
_SECONDS: Final = 4
"""Where a rank has its seconds."""


def streams(situation: Situation, bounds: Bounds) -> Iterator[Bounded]:
    """Yield bounds of nodes for the situation's model, the lowest first; maybe a node twice."""
    wanted = bounds.wanted
    known = known_nodes(situation, wanted)
    found = [iter(bounds.sorted_on(known))]
    if not wanted.model.required_labels:
        found += _free_streams(situation, bounds, known)
        if situation.may_disturb:
            found += [_idle_stream(situation, bounds, known), _busy_stream(situation, bounds, known)]
    return heapq.merge(*found)


def free_streams(
    situation: Situation, bounds: Bounds, bounded: list[Bounded], known: AbstractSet[NodeId]
) -> Iterator[Bounded]:
    """Yield the same for any model, where it disturbs nobody; `bounded` are the bounds of `known_nodes`."""
    if bounds.wanted.model.required_labels:
        return iter(bounded)
    return heapq.merge(bounded, *_free_streams(situation, bounds, known))


def known_nodes(situation: Situation, wanted: Wanted, *, free: bool = False) -> AbstractSet[NodeId]:
    """Return the nodes that are special for the model; those with all required labels where it needs some.

    Where all nodes read it from a disk, those with some of it in memory are. With `free` nodes that hold the
    checkpoint are in it only if they have free slots.
    """
    index, model = situation.index, wanted.model
    if model.required_labels:
        carriers = [index.labelled.get(label, {}).keys() for label in model.required_labels]
        return set(carriers[0]).intersection(*carriers[1:])
    holders = index.in_memory if wanted.origin == "disk" else index.holders
    holding = holders.get(model.checkpoint)
    if free:
        fewer, others = holding, index.free_nodes
        if len(others) < len(fewer):
            fewer, others = others, fewer
        nodes = {each for each in fewer if each in others}
    else:
        nodes = set(holding)
    for label in model.preferred_labels:
        nodes.update(index.labelled.get(label, ()))
    return nodes


def _free_streams(
    situation: Situation, bounds: Bounds, known: AbstractSet[NodeId]
) -> list[Iterator[Bounded]]:
    ranks = _Ranks(bounds.beyond, bounds.on, bounds.is_behind)
    return [
        _threshold_search(by_rate, by_worker, known, ranks)
        for by_rate, by_worker in rungs_of(situation.index, bounds.wanted)
    ]


def _idle_stream(situation: Situation, bounds: Bounds, known: AbstractSet[NodeId]) -> Iterator[Bounded]:
    by_rate = situation.index.idle_by_rate.get(bounds.wanted.origin)
    if by_rate is None:
        return iter(())
    by_worth = situation.index.idle_by_worth
    ranks = _Ranks(bounds.idle_beyond, bounds.idle_on, bounds.is_behind)
    return _threshold_search(by_rate, by_worth, known, ranks)


def _busy_stream(situation: Situation, bounds: Bounds, known: AbstractSet[NodeId]) -> Iterator[Bounded]:
    policy, index = situation.policy, situation.index
    by_rate = index.busy_by_rate.get(bounds.wanted.origin)
    if by_rate is None or not bounds.disturbs_busy:
        return iter(())
    if policy.may_migrate and not index.free:
        return iter(())  # nowhere to move to

    def beyond(rate: float, _: float) -> Rank:
        return bounds.busy_beyond(rate)

    candidates = tuple(islice(by_rate, policy.migration_candidates))
    return _threshold_search(candidates, None, known, _Ranks(beyond, bounds.on, bounds.is_behind))


class _Ranks(NamedTuple):
    """What a threshold search orders nodes by.

    Attributes:
        beyond: The rank that nodes behind both cursors can't beat.
        on: The rank that one node can't beat; None = it is out.
        is_behind: Tells whether a node of a rank ties with the best one at most, and loses that by its id.
    """

    beyond: Callable[[float, float], Rank]
    on: Callable[[NodeId], Rank | None]
    is_behind: Callable[[Rank, NodeId], bool]


def _threshold_search(
    by_rate: Iterable[tuple[float, NodeId]],
    by_other: Iterable[tuple[float, NodeId]] | None,
    known: AbstractSet[NodeId],
    ranks: _Ranks,
) -> Iterator[Bounded]:
    """Yield nodes of two lists by their own bounds, reading each list only as far as that takes.

    Args:
        by_rate: Nodes by negative rate.
        by_other: The same nodes by another number that costs; None = it is 0 for all of them.
        known: Nodes to leave out, for another stream has them.
        ranks: What they are ordered by.
    """
    seen = set(known)
    ready: list[Bounded] = []
    beyond, bound_on, alone = ranks.beyond, ranks.on, by_other is None
    rates, others, count = _Cursor(by_rate), _Cursor(by_other or ()), 1
    reached = beyond(-rates.reached, others.reached)
    while True:
        if alone:
            reached = _skipped_behind(rates, ranks, reached)
        while ready and ready[0][0] <= reached:
            yield heapq.heappop(ready)
        yield reached, NOBODY
        faster, reached = _next_reached(rates, others, count, beyond, alone=alone)
        rows = faster.read(count)
        if not rows:
            break
        for _, node_id in rows:
            if node_id not in seen:
                seen.add(node_id)
                bound = bound_on(node_id)
                if bound is not None:
                    heapq.heappush(ready, (bound, node_id))
        count = min(2 * count, MOST_ROWS)
    while ready:
        yield heapq.heappop(ready)


def _next_reached(
    rates: _Cursor, others: _Cursor, count: int, beyond: Callable[[float, float], Rank], *, alone: bool
) -> tuple[_Cursor, Rank]:
    """Return the list to read `count` rows of, and the rank that no node behind them beats."""
    by_rate = beyond(-rates.ahead(count), others.reached)
    if alone:
        return rates, by_rate
    by_other = beyond(-rates.reached, others.ahead(count))
    return (others, by_other) if by_other[_SECONDS] > by_rate[_SECONDS] else (rates, by_rate)


def _skipped_behind(rates: _Cursor, ranks: _Ranks, reached: Rank) -> Rank:
    """Pass nodes of a list that tie with the best one at most; return what is reached then.

    Of nodes with the same rate the ids ascend: the first of equal ones wins.
    """
    while rates.rows_left and ranks.is_behind(reached, rates.next_id):
        rates.skip_equal()
        reached = ranks.beyond(-rates.reached, 0.0)
    return reached


class _Cursor:
    """How far a list has been read."""

    __slots__ = ("_at", "_buffer", "_rows", "reached")

    def __init__(self, rows: Iterable[tuple[float, NodeId]]) -> None:
        self._rows = iter(rows)
        self._buffer: list[tuple[float, NodeId]] = list(islice(self._rows, FEW_ROWS))
        self._at = 0
        self.reached = self._buffer[0][0] if self._buffer else 0.0
        """The number of the next row, which no later one is below."""

    @property
    def rows_left(self) -> bool:
        """Tell whether there is a next row."""
        self._fill(1)
        return self._at < len(self._buffer)

    @property
    def next_id(self) -> NodeId:
        """The next row's node; IndexError where there is none."""
        return self._buffer[self._at][1]

    def skip_equal(self) -> None:
        """Go on to the first row with another number."""
        reached = self.reached
        rows = chain(self._buffer[self._at :], self._rows)
        self._rows = dropwhile(lambda row: row[0] == reached, rows)
        self._buffer, self._at = [], 0
        self.read(0)

    def ahead(self, count: int) -> float:
        """Return what would be reached `count` rows further; what is reached now where the list ends."""
        self._fill(count + 1)
        buffer, at = self._buffer, self._at + count
        if at < len(buffer):
            return buffer[at][0]
        return buffer[-1][0] if self._at < len(buffer) else self.reached

    def read(self, count: int) -> list[tuple[float, NodeId]]:
        """Return the next rows, at most `count`."""
        self._fill(count + 1)
        rows = self._buffer[self._at : self._at + count]
        self._at += len(rows)
        if self._at < len(self._buffer):
            self.reached = self._buffer[self._at][0]
        elif rows:
            self.reached = rows[-1][0]
        return rows

    def _fill(self, count: int) -> None:
        if self._at + count > len(self._buffer):
            self._buffer = [*self._buffer[self._at :], *islice(self._rows, MANY_ROWS)]
            self._at = 0
