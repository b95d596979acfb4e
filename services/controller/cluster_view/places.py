"""The sorted lists that a node belongs into, for the search to read: by rates, workers, worth. Pure.

Of a node's places only those that differ are moved. The lists are fields of an `index.Index` under way, found
by name, so that one rule serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from immutables import Map

from services.controller.cluster_view.ladder import Ladder
from services.controller.cluster_view.summary import ORIGINS, Shape, Summary
from stoker.ids import NodeId

T = TypeVar("T")
K = TypeVar("K")
Nodes = Ladder[tuple[float, NodeId]]
"""Nodes in ascending order of a number: the first is the best."""
Draft = Any
"""An index on the way to the next one: its fields may be assigned; what they hold stays immutable."""


Rung = tuple[str, int, bool, Shape]
"""Nodes that differ in nothing but their rates, and in how long a worker takes where none waits.

The origin of the bytes that their rates are about (one of `ORIGINS`); how many free slots each of them has
at least, a power of two; whether a pre-started worker waits there; what they can ever take. A plain tuple,
because every decision makes some and every event more.
"""
Place = tuple[str, str | Rung | None, NodeId | tuple[float, NodeId]]
"""One of a node's places: the list's name, its key where there are several, and the item."""


def placed_by(summary: Summary) -> tuple[object, ...]:
    """Return what of a summary decides where `places` has the node, the number of its free slots aside."""
    return (
        summary.is_open,
        summary.worker_seconds,
        summary.device_rate,
        summary.rates,
        summary.openings,
        summary.shape,
    )


def has_free_slots(summary: Summary | None) -> bool:
    """Tell whether replicas can be placed on the node, and nobody has to make room for them."""
    return summary is not None and summary.is_open and bool(summary.free)


def move(draft: Draft, had: Iterable[Place], has: Iterable[Place]) -> None:
    """Take a node out of the lists that it does not belong into any more, and put it into the others."""
    before, now = set(had), set(has)
    for place in before - now:
        _place(draft, place, present=False)
    for place in now - before:
        _place(draft, place, present=True)


def places(summary: Summary | None, node_id: NodeId) -> Iterator[Place]:
    """Yield the sorted lists a node belongs into, whatever may be disturbed there."""
    if summary is None or not summary.is_open:
        return
    yield "open_nodes", None, node_id
    yield "by_device", None, (summary.device_rate, node_id)
    for origin, opening_seconds in zip(ORIGINS, summary.openings, strict=True):
        yield "by_opening", origin, (opening_seconds, node_id)
    waits = not summary.worker_seconds
    for origin, rate in zip(ORIGINS, summary.rates, strict=True):
        rank = (-rate, node_id)
        for free in _steps(len(summary.free)):
            yield "free", (origin, free, waits, summary.shape), rank
    if not waits:
        for free in _steps(len(summary.free)):
            by_worker = (summary.worker_seconds, node_id)
            yield "free_by_worker", ("", free, waits, summary.shape), by_worker


def disturbing_places(summary: Summary | None, node_id: NodeId) -> Iterator[Place]:
    """Yield the sorted lists of nodes with replicas that may go, as far as a node belongs into them."""
    if summary is None or not summary.is_open:
        return
    if summary.worth_keys:
        yield "idle_by_worth", None, (summary.worth_keys[0][0], node_id)
        for origin, rate in zip(ORIGINS, summary.rates, strict=True):
            yield "idle_by_rate", origin, (-rate, node_id)
    if summary.busy:
        for origin, rate in zip(ORIGINS, summary.rates, strict=True):
            yield "busy_by_rate", origin, (-rate, node_id)


def move_free(draft: Draft, was: Summary, now: Summary, node_id: NodeId) -> None:
    """Move an open node between the rungs of its `places`: only the number of its free slots has changed."""
    was_steps, now_steps = len(was.free).bit_length(), len(now.free).bit_length()
    comes, waits = now_steps > was_steps, not now.worker_seconds
    for step in range(min(was_steps, now_steps), max(was_steps, now_steps)):
        for origin, rate in zip(ORIGINS, now.rates, strict=True):
            _place(draft, ("free", (origin, 1 << step, waits, now.shape), (-rate, node_id)), present=comes)
        if not waits:
            by_worker = (now.worker_seconds, node_id)
            _place(draft, ("free_by_worker", ("", 1 << step, waits, now.shape), by_worker), present=comes)


def move_disturbed(draft: Draft, was: Summary, now: Summary, node_id: NodeId) -> None:
    """Move an open node between its `disturbing_places`: its rates are the same."""
    was_key = was.worth_keys[0][0] if was.worth_keys else None
    now_key = now.worth_keys[0][0] if now.worth_keys else None
    if was_key != now_key:
        by_worth: Nodes = draft.idle_by_worth
        if was_key is not None and now_key is not None:
            draft.idle_by_worth = by_worth.moved((was_key, node_id), (now_key, node_id))
        elif was_key is not None:
            draft.idle_by_worth = by_worth.removed((was_key, node_id))
        elif now_key is not None:
            draft.idle_by_worth = by_worth.added((now_key, node_id))
    for name, was_in, now_in in (
        ("idle_by_rate", was_key is not None, now_key is not None),
        ("busy_by_rate", bool(was.busy), bool(now.busy)),
    ):
        if was_in != now_in:
            for origin, rate in zip(ORIGINS, now.rates, strict=True):
                _place(draft, (name, origin, (-rate, node_id)), present=now_in)


def _steps(count: int) -> Iterator[int]:
    """Yield the powers of two that are no more than `count`."""
    step = 1
    while step <= count:
        yield step
        step *= 2


def _place(draft: Draft, place: Place, *, present: bool) -> None:
    name, key, item = place
    lists = getattr(draft, name)
    ladder = lists if key is None else lists.get(key, _NOBODY)
    ladder = ladder.added(item) if present else ladder.removed(item)
    setattr(draft, name, ladder if key is None else put(lists, key, ladder or None))


_NOBODY: Ladder[NodeId] = Ladder()


def put(mapping: Map[K, T], key: K, value: T | None) -> Map[K, T]:
    """Return the mapping with this value; without the key where there is none."""
    if value is not None:
        return mapping.set(key, value)
    return mapping.delete(key) if key in mapping else mapping
