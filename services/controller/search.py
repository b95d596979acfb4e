"""The best node for a model without looking at all of them: best first, exact. Pure.

Each stream gives nodes in ascending order of a rank that none of its later nodes can beat, and in between
says how far it has come; the search takes the lowest of all streams until it is above the best found (A*
without a goal). So a stream is read only as far as its next node could still win. Streams:

1. Nodes that hold some of the checkpoint, and those with a preferred label: by what they cost at least.
2. Open nodes with enough free slots, by rung (`index.Rung`), the fastest first. Where no worker waits, two
   lists are read in turn, by rate and by the worker's time: unseen nodes take at least the rate of the one
   cursor and the worker of the other (Fagin's threshold algorithm, PODS '01).
3. Open nodes with idle replicas, likewise by rate and by worth.
4. Open nodes with busy replicas that may be moved or drained, the fastest first, at most
   `migration_candidates` of them.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter

from services.controller.estimate import (
    NOTHING_HELD,
    bytes_per_second,
    learnt_parts,
    load_seconds,
    opening_seconds,
    source_of,
)
from services.controller.index import Nodes, Rung
from services.controller.lessons import starts_like
from services.controller.moves import least_move
from services.controller.options import Option, Rank, best_on, free_option, rank
from services.controller.room import Situation, Wanted, can_ever, wanted_of
from services.controller.summary import ORIGINS, Summary, worth_seconds
from services.controller.view import Node
from stoker.ids import ModelName, NodeId

SHOWN = 2
"""Options that are looked for at least, so that an explanation can name a runner-up; one that disturbs others
is worked out only if it could win."""
LOOKED = 8
"""Nodes looked at for the sake of a runner-up, at most."""
Bounded = tuple[Rank, NodeId]
NOBODY = NodeId("")
"""In place of a node: whatever the stream gives next is not below this rank."""
ASKED_EVERY = 4
"""Rows of a list between two looks at what those that follow cost at least, once the first few are read."""
TOLD_EVERY = 8
"""Rows of a list between two notes of how far it has been read."""
ROUNDING = 1 - 1e-9
"""Sums of the same terms in another order may differ by a rounding; a bound must not be above its node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best option, if any, and all that were looked at, the best first."""

    best: Option | None
    options: tuple[Option, ...]


def search(situation: Situation, *, exhaustive: bool = False) -> Found:
    """Return the best way to start the situation's model; `exhaustive` looks at every open node."""
    options: list[Option] = []
    best: Option | None = None
    best_rank: Rank | None = None
    looked: set[NodeId] = set()
    destinations = Destinations(situation)
    streams = _every_node(situation) if exhaustive else _streams(situation, destinations)
    for bound, node_id in streams:
        if (
            best_rank is not None
            and bound > best_rank
            and (bound[1] or len(options) >= SHOWN or len(looked) >= LOOKED)
        ):
            break
        if node_id == NOBODY or node_id in looked:
            continue
        looked.add(node_id)
        option = best_on(
            situation,
            situation.view.nodes[node_id],
            destinations,
            None if exhaustive else best_rank,
        )
        if option is not None:
            options.append(option)
            ranked = rank(option, situation.policy)
            if best_rank is None or ranked < best_rank:
                best, best_rank = option, ranked
    options.sort(key=lambda option: rank(option, situation.policy))
    return Found(best=best, options=tuple(options))


class Destinations:
    """Where replicas could move to; remembers what it has found, for one decision."""

    def __init__(self, situation: Situation) -> None:
        self._situation = situation
        self._wanted: dict[ModelName, Wanted] = {}
        self._move: tuple[float, float] | None = None
        self._swiftest: dict[ModelName, float] = {}
        self._least: dict[ModelName, float | None] = {}
        self._known: dict[ModelName, tuple[int, tuple[Option, ...]]] = {}

    def move_seconds(self, tokens: int) -> float:
        """Return what moving sessions of at least so many tokens takes at least, whatever their model."""
        if self._move is None:
            self._move = least_move(self._situation.view, self._situation.policy)
        slope, offset = self._move
        return (slope * tokens + offset) * ROUNDING

    def copy_seconds(self, file_bytes: int) -> float:
        """Return what it takes at least to copy so many bytes to a device, on any node."""
        devices = self._situation.index.by_device
        return file_bytes / devices.last[0] if devices else 0.0

    def swiftest_seconds(self, name: ModelName) -> float:
        """Return what starting the model takes at least, were there a free node with all of it in memory."""
        if name not in self._swiftest:
            view = self._situation.view
            model = view.models[name]
            parts = learnt_parts(model, starts_like(view, model))
            self._swiftest[name] = parts.start_seconds(0.0, self.copy_seconds(model.file_bytes)) * ROUNDING
        return self._swiftest[name]

    def least_seconds(self, name: ModelName) -> float | None:
        """Return what starting the model on free slots takes at least, anywhere; None = nowhere."""
        if name not in self._least:
            self._least[name] = _least_seconds(self._situation, self._of(name))
        return self._least[name]

    def best(self, name: ModelName, not_on: NodeId, count: int) -> tuple[Option, ...]:
        """Return the best `count` ways to start a model that disturb nobody, on nodes other than `not_on`."""
        known, options = self._known.get(name, (0, ()))
        if known < count + 1:
            known, options = count + 1, _free_options(self._situation, self._of(name), count + 1)
            self._known[name] = (known, options)
        return tuple(option for option in options if option.node_id != not_on)[:count]

    def _of(self, name: ModelName) -> Wanted:
        if name not in self._wanted:
            self._wanted[name] = wanted_of(self._situation.view, self._situation.index, name)
        return self._wanted[name]


def _least_seconds(situation: Situation, wanted: Wanted) -> float | None:
    """Return the lowest bound of all free nodes: the first of each stream, nothing queued."""
    index, model = situation.index, wanted.model
    if not index.open_nodes:
        return None
    least_load = _least_load(situation, wanted)
    least = [
        wanted.parts.start_seconds(
            index.free_by_worker[rung._replace(origin="")].first[0] if not rung.waits else 0.0,
            least_load(-nodes.first[0]),
        )
        for rung, nodes in _rungs(situation, wanted)
    ]
    for node_id in index.free_holders.get(model.checkpoint, ()):
        summary = index.summaries[node_id]
        if len(summary.free) >= wanted.slots:
            least.append(_start_seconds(situation, wanted, node_id, summary))
    return min(least) * ROUNDING if least else None


def _free_options(situation: Situation, wanted: Wanted, count: int) -> tuple[Option, ...]:
    found: list[tuple[Rank, Option]] = []
    looked: set[NodeId] = set()
    known = _known_nodes(situation, wanted, free=True)
    bounds = _bounds(situation, wanted, known, None)
    for bound, node_id in heapq.merge(bounds, *_free_streams(situation, wanted, known)):
        if len(found) >= count and bound > found[count - 1][0]:
            break
        if node_id == NOBODY or node_id in looked:
            continue
        looked.add(node_id)
        node, summary = situation.view.nodes[node_id], situation.index.summaries[node_id]
        option = free_option(situation, node, wanted) if can_ever(wanted, node, summary) else None
        if option is not None:
            insort(found, (rank(option, situation.policy), option), key=itemgetter(0))
    return tuple(option for _, option in found[:count])


def _streams(situation: Situation, destinations: Destinations) -> Iterator[Bounded]:
    wanted = situation.wanted
    known = _known_nodes(situation, wanted)
    making = destinations if situation.may_disturb else None
    streams = [iter(_bounds(situation, wanted, known, making))]
    if not wanted.model.required_labels:
        streams += _free_streams(situation, wanted, known)
        if situation.may_disturb:
            streams += [
                _idle_stream(situation, known, destinations),
                _busy_stream(situation, known, destinations),
            ]
    return heapq.merge(*streams)


def _every_node(situation: Situation) -> Iterator[Bounded]:
    return ((LOWEST, node_id) for node_id in situation.index.open_nodes)


LOWEST: Rank = (-1, 0, 0.0, 0, 0.0, "")


def _known_nodes(situation: Situation, wanted: Wanted, *, free: bool = False) -> AbstractSet[NodeId]:
    """Return the nodes that are special for the model; those with all required labels where it needs some.

    With `free` those that hold the checkpoint are in it only if they have free slots.
    """
    index, model = situation.index, wanted.model
    if model.required_labels:
        carriers = [index.labelled.get(label, {}).keys() for label in model.required_labels]
        return set(carriers[0]).intersection(*carriers[1:])
    holders = index.free_holders if free else index.holders
    nodes = set(holders.get(model.checkpoint, ()))
    for label in model.preferred_labels:
        nodes.update(index.labelled.get(label, ()))
    return nodes


def _bounds(
    situation: Situation, wanted: Wanted, nodes: Iterable[NodeId], making: Destinations | None
) -> list[Bounded]:
    """Return the ranks that a start on each of these nodes can't beat, the lowest first."""
    found = []
    for node_id in nodes:
        bound = _bound_on(situation, wanted, node_id, making)
        if bound is not None:
            found.append((bound, node_id))
    found.sort()
    return found


def _bound_on(
    situation: Situation, wanted: Wanted, node_id: NodeId, making: Destinations | None
) -> Rank | None:
    """Return the lowest rank of a start on the node; None = there is no room, and nobody to make some.

    Args:
        situation: What the decision is about.
        wanted: What is to start.
        node_id: Where.
        making: Where those who make room could move to; None = nobody may be disturbed.
    """
    summary = situation.index.summaries[node_id]
    if not summary.is_open or not wanted.slots_that_fit(summary.shape):
        return None
    preferred = 0
    if wanted.model.preferred_labels:
        preferred = len(wanted.model.preferred_labels & situation.view.nodes[node_id].labels)
    if len(summary.free) >= wanted.slots:
        # with a pool that is full somebody may have to go all the same: that costs no less
        return _rank(situation, _start_seconds(situation, wanted, node_id, summary), preferred)
    if making is None:
        return None
    disturbing = _least_disturbing(situation, summary, making)
    if disturbing is None:
        return None
    cost_seconds, worth = disturbing
    seconds = _start_seconds(situation, wanted, node_id, summary) + cost_seconds
    return _rank(situation, seconds, preferred, victims=1, worth=worth)


def _least_disturbing(
    situation: Situation, summary: Summary, making: Destinations
) -> tuple[float, float] | None:
    """Return what making room costs at least (seconds: wait and weighted disturbance), and disturbs at least.

    Any set of victims costs no less than the cheapest single one. None = nobody could go.
    """
    policy, weight = situation.policy, _weight(situation)
    idle: tuple[float, float] | None = None
    if summary.worth_keys:
        worth = worth_seconds(summary.worth_keys[0][0], situation.now_seconds)
        idle = (policy.stop_seconds + weight * worth, worth)
    if not summary.busy or not (policy.may_migrate or situation.waited_too_long):
        return idle
    if policy.may_migrate:
        seconds = making.move_seconds(summary.busy_tokens)
        busy = (making.copy_seconds(summary.busy_bytes) * ROUNDING + (1 + weight) * seconds, seconds)
    else:
        seconds = policy.drain_grace_seconds
        busy = ((1 + weight) * seconds, seconds)
    return busy if idle is None else (min(idle[0], busy[0]), min(idle[1], busy[1]))


def _start_seconds(situation: Situation, wanted: Wanted, node_id: NodeId, summary: Summary) -> float:
    """Return how long a start takes on the node, once there is room."""
    node = situation.view.nodes[node_id]
    if summary.queued:
        load = load_seconds(
            wanted.model,
            node,
            loading_bytes=summary.loading_bytes,
            has_peer=wanted.has_peer(node_id),
            is_coming=wanted.model.checkpoint in summary.loading,
        )
        return wanted.parts.start_seconds(summary.worker_seconds, load)
    return wanted.parts.start_seconds(summary.worker_seconds, _unqueued_seconds(wanted, node, summary))


def _unqueued_seconds(wanted: Wanted, node: Node, summary: Summary) -> float:
    """Return how long a load takes where nothing is queued: `load_seconds` from the summary's rates."""
    model = wanted.model
    held = node.held.get(model.checkpoint)
    if held is None:
        origin = ORIGINS.index(wanted.origin)
        rate = summary.rates[origin]
        if rate < summary.device_rate:
            return summary.openings[origin] + model.file_bytes / rate
    held = held or NOTHING_HELD
    missing_bytes = model.file_bytes - held.dram_bytes
    device_seconds = model.file_bytes / summary.device_rate
    if missing_bytes <= 0:
        return device_seconds
    source = source_of(model, held, has_peer=wanted.has_peer(node.node_id))
    seconds = opening_seconds(node, source) + missing_bytes / bytes_per_second(node, source)
    return max(seconds, device_seconds)


def _least_load(situation: Situation, wanted: Wanted) -> Callable[[float], float]:
    """Return how long a load takes at least (seconds) where nothing is held, at no more than a rate."""
    index = situation.index
    opening_seconds = index.by_opening[wanted.origin].first[0]
    slowest_device = index.by_device.first[0]

    def seconds(rate: float) -> float:
        # a device that is slower than the source may hide the opening behind its copy
        hidden = slowest_device <= rate
        return (0.0 if hidden else opening_seconds) + wanted.model.file_bytes / rate

    return seconds


def _rank(
    situation: Situation, seconds: float, preferred: int = 0, *, victims: int = 0, worth: float = 0.0
) -> Rank:
    """Return the lowest rank of an option that costs no less than this."""
    seconds *= ROUNDING
    step = int(seconds / situation.policy.tie_seconds)
    return (step, victims, worth * ROUNDING, -preferred, seconds, "")


def _weight(situation: Situation) -> float:
    return 1.0 if situation.waited_too_long else situation.policy.hysteresis_ratio


def _rungs(situation: Situation, wanted: Wanted) -> Iterator[tuple[Rung, Nodes]]:
    """Yield where free nodes are listed that could take the model, by the rate it would load at."""
    index, free = situation.index, 1 << (wanted.slots.bit_length() - 1)
    for shape in index.shapes:
        if wanted.slots_that_fit(shape):
            for waits in (True, False):
                rung = Rung(wanted.origin, free, waits, shape)
                nodes = index.free.get(rung)
                if nodes is not None:
                    yield rung, nodes


def _free_streams(
    situation: Situation, wanted: Wanted, known: AbstractSet[NodeId]
) -> list[Iterator[Bounded]]:
    if not situation.index.open_nodes:
        return []
    least_load = _least_load(situation, wanted)

    def bound_of(node_id: NodeId) -> Rank | None:
        return _bound_on(situation, wanted, node_id, None)

    def threshold(rate: float, worker_seconds: float) -> Rank:
        return _rank(situation, wanted.parts.start_seconds(worker_seconds, least_load(rate)))

    by_worker = situation.index.free_by_worker
    return [
        _threshold_search(
            by_rate, None if rung.waits else by_worker[rung._replace(origin="")], known, threshold, bound_of
        )
        for rung, by_rate in _rungs(situation, wanted)
    ]


def _idle_stream(situation: Situation, known: AbstractSet[NodeId], making: Destinations) -> Iterator[Bounded]:
    wanted, index, policy = situation.wanted, situation.index, situation.policy
    by_rate = index.idle_by_rate.get(wanted.origin)
    if by_rate is None:
        return iter(())

    least_load, weight = _least_load(situation, wanted), _weight(situation)
    disturbs_busy = policy.may_migrate or situation.waited_too_long

    origin, file_bytes = ORIGINS.index(wanted.origin), wanted.model.file_bytes
    start_seconds, now_seconds, summaries = wanted.parts.start_seconds, situation.now_seconds, index.summaries

    def bound_of(node_id: NodeId) -> Rank | None:
        summary = summaries[node_id]
        if len(summary.free) >= wanted.slots:
            return None  # a stream of free nodes has it
        rate = summary.rates[origin]
        if (
            summary.queued
            or (disturbs_busy and summary.busy)
            or rate >= summary.device_rate
            or not wanted.slots_that_fit(summary.shape)
        ):
            return _bound_on(situation, wanted, node_id, making)
        # it holds nothing: those that do are in `known`
        load = summary.openings[origin] + file_bytes / rate
        worth = worth_seconds(summary.worth_keys[0][0], now_seconds)
        seconds = policy.stop_seconds + start_seconds(summary.worker_seconds, load)
        return _rank(situation, seconds + weight * worth, victims=1, worth=worth)

    def threshold(rate: float, key: float) -> Rank:
        worth = worth_seconds(key, situation.now_seconds)
        stop_seconds = 0.0 if disturbs_busy else policy.stop_seconds
        seconds = stop_seconds + wanted.parts.start_seconds(0.0, least_load(rate))
        return _rank(situation, seconds + weight * worth, victims=1)

    return _threshold_search(by_rate, index.idle_by_worth, known, threshold, bound_of)


def _threshold_search(
    by_rate: Iterable[tuple[float, NodeId]],
    by_other: Nodes | None,
    known: AbstractSet[NodeId],
    threshold: Callable[[float, float], Rank],
    bound_of: Callable[[NodeId], Rank | None],
) -> Iterator[Bounded]:
    """Yield nodes of two lists by their own bounds, reading each list only as far as that takes.

    Args:
        by_rate: Nodes by negative rate.
        by_other: The same nodes by another number that costs; None = it is 0 for all of them.
        known: Nodes to leave out, for another stream has them.
        threshold: The rank that nodes behind both cursors can't beat.
        bound_of: The rank that one node can't beat; None = it is out.
    """
    seen = set(known)
    ready: list[Bounded] = []
    others = by_other if by_other is not None else ((0.0, node_id) for _, node_id in by_rate)
    for row, ((negative_rate, fast), (other, cheap)) in enumerate(zip(by_rate, others, strict=True)):
        if row < ASKED_EVERY or not row % ASKED_EVERY:
            reached = threshold(-negative_rate, other)
            while ready and ready[0][0] <= reached:
                yield heapq.heappop(ready)
            if not row % TOLD_EVERY:
                yield reached, NOBODY
        for node_id in (fast, cheap):
            if node_id not in seen:
                seen.add(node_id)
                bound = bound_of(node_id)
                if bound is not None:
                    heapq.heappush(ready, (bound, node_id))
    while ready:
        yield heapq.heappop(ready)


def _busy_stream(situation: Situation, known: AbstractSet[NodeId], making: Destinations) -> Iterator[Bounded]:
    wanted, policy, index = situation.wanted, situation.policy, situation.index
    if not (policy.may_migrate or situation.waited_too_long):
        return iter(())
    if policy.may_migrate and not index.free:
        return iter(())  # nowhere to move to

    ladder = index.busy_by_rate.get(wanted.origin)
    if ladder is None:
        return iter(())
    least_load = _least_load(situation, wanted)

    def bound_of(node_id: NodeId) -> Rank | None:
        return _bound_on(situation, wanted, node_id, making)

    def threshold(rate: float, _: float) -> Rank:
        return _rank(situation, wanted.parts.start_seconds(0.0, least_load(rate)), victims=1)

    candidates = tuple(islice(ladder, policy.migration_candidates))
    return _threshold_search(candidates, None, known, threshold, bound_of)
