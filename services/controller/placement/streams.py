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
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from itertools import islice

from services.controller.cluster_view.groups import Members
from services.controller.cluster_view.index import Index
from services.controller.placement.bounds import NOBODY, Bounded, Bounds
from services.controller.placement.cursor import Cursor, Runs, next_reached
from services.controller.placement.idle import idle_nodes
from services.controller.placement.options import Rank
from services.controller.placement.rates import rungs_of
from services.controller.placement.room import Situation, Wanted
from stoker.ids import NodeId

MOST_ROWS = 8
"""Rows of a list read between two looks at what those that follow cost at least."""


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
    nodes = free_among(index, holding) if free else set(holding)
    for label in model.preferred_labels:
        nodes.update(index.labelled.get(label, ()))
    return nodes


def free_among(index: Index, nodes: Members) -> set[NodeId]:
    """Return those of some nodes that have free slots."""
    fewer, others = nodes, index.free_nodes
    if len(others) < len(fewer):
        fewer, others = others, fewer
    return set(filter(others.__contains__, fewer))


def _free_streams(
    situation: Situation, bounds: Bounds, known: AbstractSet[NodeId]
) -> list[Iterator[Bounded]]:
    return [
        _one_list(by_rate.runs, known, bounds, bounds.beyond)
        if by_worker is None
        else _two_lists(by_rate.runs, by_worker.runs, known, bounds)
        for by_rate, by_worker in rungs_of(situation.index, bounds.wanted)
    ]


def _idle_stream(situation: Situation, bounds: Bounds, known: AbstractSet[NodeId]) -> Iterator[Bounded]:
    by_rate = situation.index.idle_by_rate.get(bounds.wanted.origin)
    if by_rate is None:
        return iter(())
    index = situation.index
    return idle_nodes(by_rate.runs, index.idle_by_worth.runs, known, bounds, alone=not index.free_nodes)


def _busy_stream(situation: Situation, bounds: Bounds, known: AbstractSet[NodeId]) -> Iterator[Bounded]:
    policy, index = situation.policy, situation.index
    by_rate = index.busy_by_rate.get(bounds.wanted.origin)
    if by_rate is None or not bounds.disturbs_busy:
        return iter(())
    if policy.may_migrate and not index.free:
        return iter(())  # nowhere to move to

    candidates = tuple(islice(by_rate, policy.migration_candidates))
    return _one_list((candidates,), known, bounds, bounds.busy_beyond)


def _one_list(
    by_rate: Runs, known: AbstractSet[NodeId], bounds: Bounds, beyond: Callable[[float, float], Rank]
) -> Iterator[Bounded]:
    """Yield nodes of a list by their own bounds, reading it only as far as that takes.

    Args:
        by_rate: Nodes by negative rate.
        known: Nodes to leave out, for another stream has them.
        bounds: What they cost at least.
        beyond: Returns the rank that nodes of at most a rate can't beat.
    """
    seen = set(known)
    ready: list[Bounded] = []
    rates, count = Cursor(by_rate), 1
    reached = beyond(-rates.reached, 0.0)
    while True:
        reached = _skipped_behind(rates, bounds, beyond, reached)
        while ready and ready[0][0] <= reached:
            yield heapq.heappop(ready)
        yield reached, NOBODY
        rows = rates.read(count)
        if not rows:
            break
        reached = beyond(-rates.reached, 0.0)
        for bounded in bounds.all_on(rows, seen):
            heapq.heappush(ready, bounded)
        count = min(2 * count, MOST_ROWS)
    while ready:
        yield heapq.heappop(ready)


def _two_lists(
    by_rate: Runs, by_worker: Runs, known: AbstractSet[NodeId], bounds: Bounds
) -> Iterator[Bounded]:
    """Yield the same of free nodes that are also listed by the time that a worker takes."""
    seen = set(known)
    ready: list[Bounded] = []
    beyond = bounds.beyond
    rates, workers, count = Cursor(by_rate), Cursor(by_worker), 1
    reached = beyond(-rates.reached, workers.reached)
    while True:
        while ready and ready[0][0] <= reached:
            yield heapq.heappop(ready)
        yield reached, NOBODY
        faster, reached = next_reached(rates, workers, count, beyond)
        rows = faster.read(count)
        if not rows:
            break
        for bounded in bounds.all_on(rows, seen):
            heapq.heappush(ready, bounded)
        count = min(2 * count, MOST_ROWS)
    while ready:
        yield heapq.heappop(ready)


def _skipped_behind(
    rates: Cursor, bounds: Bounds, beyond: Callable[[float, float], Rank], reached: Rank
) -> Rank:
    """Pass nodes of a list that tie with the best one at most; return what is reached then.

    Of nodes with the same rate the ids ascend: the first of equal ones wins.
    """
    while bounds.best is not None and rates.rows_left and bounds.is_behind(reached, rates.next_id):
        rates.skip_equal()
        reached = beyond(-rates.reached, 0.0)
    return reached
