"""The best node for a model without looking at all of them: best first, exact. Pure.

Each stream gives nodes in ascending order of a rank that none of its later nodes can beat; the search takes
the lowest of all streams until it is above the best found (A* without a goal). Streams, and their bounds:

1. Nodes that hold some of the checkpoint, and those with a preferred label: by what they cost at least.
2. Open nodes with enough free slots, by rung (`index.Rung`), the fastest first: exact if nothing is queued.
   Where no worker waits, two lists are read in turn, by rate and by the worker's time: unseen nodes take at
   least the rate of the one cursor and the worker of the other (Fagin's threshold algorithm, PODS '01).
3. Open nodes with idle replicas, likewise by rate and by worth.
4. Open nodes with busy replicas that may be moved or drained, the fastest first, at most
   `migration_candidates` of them.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter

from immutables import Map

from services.controller.estimate import LearntParts, bytes_per_second, has_own_memory, learnt_parts
from services.controller.index import Ladder
from services.controller.lessons import starts_like
from services.controller.options import Option, Rank, best_on, free_option, rank
from services.controller.room import (
    NOTHING_HELD,
    Situation,
    devices_needed,
    fitting_devices,
    has_peer,
    never_fits,
)
from services.controller.summary import ORIGINS, Summary, worth_seconds
from services.controller.view import Model
from stoker.ids import ModelName, NodeId

SHOWN = 2
"""Options that are looked for at least, so that an explanation can name a runner-up."""
LOOKED = 8
"""Nodes looked at for the sake of a runner-up, at most."""
Bounded = tuple[Rank, NodeId]
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
    streams = _every_node(situation) if exhaustive else _streams(situation)
    for bound, node_id in streams:
        if best_rank is not None and bound > best_rank and (len(options) >= SHOWN or len(looked) >= LOOKED):
            break
        if node_id in looked:
            continue
        looked.add(node_id)
        option = best_on(
            situation,
            situation.view.nodes[node_id],
            destinations.best,
            None if exhaustive else best_rank if len(options) >= SHOWN else None,
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
        self._known: dict[ModelName, tuple[int, tuple[Option, ...]]] = {}

    def best(self, model: Model, not_on: NodeId, count: int) -> tuple[Option, ...]:
        """Return the best `count` ways to start `model` that disturb nobody, on nodes other than `not_on`."""
        known, options = self._known.get(model.name, (0, ()))
        if known < count + 1:
            known, options = count + 1, _free_options(self._situation, model, count + 1)
            self._known[model.name] = (known, options)
        return tuple(option for option in options if option.node_id != not_on)[:count]


def _free_options(situation: Situation, model: Model, count: int) -> tuple[Option, ...]:
    parts = learnt_parts(model, starts_like(situation.view, model))
    found: list[tuple[Rank, Option]] = []
    looked: set[NodeId] = set()
    for bound, node_id in heapq.merge(
        _known_nodes(situation, model, parts), *_free_streams(situation, model, parts)
    ):
        if len(found) >= count and bound > found[count - 1][0]:
            break
        if node_id in looked:
            continue
        looked.add(node_id)
        node = situation.view.nodes[node_id]
        option = free_option(situation, node, model) if never_fits(model, node) is None else None
        if option is not None:
            insort(found, (rank(option, situation.policy), option), key=itemgetter(0))
    return tuple(option for _, option in found[:count])


def _streams(situation: Situation) -> Iterator[Bounded]:
    model = situation.model
    streams = [_known_nodes(situation, model, situation.parts)]
    if not model.required_labels:
        streams += _free_streams(situation, model, situation.parts)
        if situation.may_disturb:
            streams += [_idle_stream(situation), _busy_stream(situation)]
    return heapq.merge(*streams)


def _every_node(situation: Situation) -> Iterator[Bounded]:
    return ((LOWEST, node_id) for node_id in situation.index.open_nodes)


LOWEST: Rank = (-1, 0, 0.0, 0, 0.0, "")


def _known_nodes(situation: Situation, model: Model, parts: LearntParts) -> Iterator[Bounded]:
    """Yield the nodes that are special for the model; those with all required labels where it needs some."""
    index = situation.index
    if model.required_labels:
        carriers = [set(index.labelled.get(label, ())) for label in model.required_labels]
        nodes = set.intersection(*carriers)
    else:
        nodes = set(index.holders.get(model.checkpoint, ()))
        for label in model.preferred_labels:
            nodes.update(index.labelled.get(label, ()))
    bounds = (
        (_known_bound(situation, model, parts, node_id), node_id)
        for node_id in nodes
        if index.summaries[node_id].is_open
    )
    return iter(sorted((bound, node_id) for bound, node_id in bounds if bound is not None))


def _known_bound(situation: Situation, model: Model, parts: LearntParts, node_id: NodeId) -> Rank | None:
    """Return what a start on the node costs at least: nothing queued. None = nobody there could make room."""
    node, summary = situation.view.nodes[node_id], situation.index.summaries[node_id]
    held = node.held.get(model.checkpoint, NOTHING_HELD)
    load_seconds = max(0, model.file_bytes - held.dram_bytes) / max(summary.rates)
    if has_own_memory(node):
        load_seconds = max(load_seconds, model.file_bytes / bytes_per_second(node, "device"))
    preferred = len(model.preferred_labels & node.labels)
    if len(summary.free) >= devices_needed(model):
        return _bound(situation, parts.start_seconds(summary.worker_seconds, load_seconds), preferred)
    return _disturbing_bound(situation, parts, summary, load_seconds, preferred)


def _bound(situation: Situation, seconds: float, preferred: int = 0) -> Rank:
    """Return the lowest rank of an option that disturbs nobody and takes no less than this."""
    seconds *= ROUNDING
    return (int(seconds / situation.policy.tie_seconds), 0, 0.0, -preferred, seconds, "")


def _disturbing_bound(
    situation: Situation, parts: LearntParts, summary: Summary, load_seconds: float, preferred: int = 0
) -> Rank | None:
    """Return the lowest rank of an option that disturbs somebody on a node; None = it can't."""
    policy = situation.policy
    stop_seconds, worth = policy.stop_seconds, 0.0
    if summary.has_busy and (policy.may_migrate or situation.waited_too_long):
        stop_seconds = 0.0
    elif summary.worth_keys:
        worth = worth_seconds(summary.worth_keys[0][0], situation.now_seconds)
    else:
        return None
    weight = 1.0 if situation.waited_too_long else policy.hysteresis_ratio
    seconds = parts.start_seconds(stop_seconds + summary.worker_seconds, load_seconds) + weight * worth
    seconds *= ROUNDING
    return (int(seconds / policy.tie_seconds), 1, worth * ROUNDING, -preferred, seconds, "")


def _free_streams(situation: Situation, model: Model, parts: LearntParts) -> list[Iterator[Bounded]]:
    index, needed = situation.index, devices_needed(model)
    fits: dict[int, bool] = {}
    streams = []
    for rung, ladder in index.free.get(_origin(situation, model), Map()).items():
        if rung.free < needed:
            continue
        shape = id(rung.shape)
        if shape not in fits:
            fits[shape] = _shape_fits(situation, model, ladder)
        if not fits[shape]:
            continue
        if rung.waits:
            streams.append(_warm_stream(situation, model, parts, ladder))
        else:
            streams.append(_cold_stream(situation, model, parts, ladder, index.free_by_worker[rung]))
    return streams


def _origin(situation: Situation, model: Model) -> str:
    """Return where a node that holds nothing gets the bytes from."""
    if model.origin == "disk":
        return "disk"
    return "peer" if has_peer(situation, model, NodeId("")) else "remote"


def _shape_fits(situation: Situation, model: Model, ladder: Ladder) -> bool:
    node = situation.view.nodes[ladder[0][1]]
    if node.architectures and model.architecture not in node.architectures:
        return False
    if 0 < node.pool.total_bytes < model.file_bytes:
        return False
    return len(fitting_devices(model, node)) >= devices_needed(model)


def _warm_stream(
    situation: Situation, model: Model, parts: LearntParts, by_rate: Ladder
) -> Iterator[Bounded]:
    for negative_rate, node_id in by_rate:
        seconds = parts.start_seconds(0.0, model.file_bytes / -negative_rate)
        yield (int(seconds / situation.policy.tie_seconds), 0, 0.0, 0, seconds, node_id), node_id


def _cold_stream(
    situation: Situation, model: Model, parts: LearntParts, by_rate: Ladder, by_worker: Ladder
) -> Iterator[Bounded]:
    origin = ORIGINS.index(_origin(situation, model))

    def bound_of(node_id: NodeId) -> Rank:
        summary = situation.index.summaries[node_id]
        seconds = parts.start_seconds(summary.worker_seconds, model.file_bytes / summary.rates[origin])
        return (int(seconds / situation.policy.tie_seconds), 0, 0.0, 0, seconds, node_id)

    def threshold(rate: float, worker_seconds: float) -> Rank:
        return _bound(situation, parts.start_seconds(worker_seconds, model.file_bytes / rate))

    return _threshold_search(by_rate, by_worker, threshold, bound_of)


def _idle_stream(situation: Situation) -> Iterator[Bounded]:
    model, index, policy = situation.model, situation.index, situation.policy
    origin = ORIGINS.index(_origin(situation, model))
    weight = 1.0 if situation.waited_too_long else policy.hysteresis_ratio

    def bound_of(node_id: NodeId) -> Rank | None:
        summary = index.summaries[node_id]
        load_seconds = model.file_bytes / summary.rates[origin]
        return _disturbing_bound(situation, situation.parts, summary, load_seconds)

    def threshold(rate: float, key: float) -> Rank:
        worth = worth_seconds(key, situation.now_seconds)
        before_seconds = 0.0 if policy.may_migrate or situation.waited_too_long else policy.stop_seconds
        seconds = situation.parts.start_seconds(before_seconds, model.file_bytes / rate) + weight * worth
        seconds *= ROUNDING
        return (int(seconds / policy.tie_seconds), 1, 0.0, 0, seconds, "")

    by_rate = index.idle_by_rate.get(ORIGINS[origin], ())
    return _threshold_search(by_rate, index.idle_by_worth, threshold, bound_of)


def _threshold_search(
    by_rate: Ladder,
    by_other: Ladder,
    threshold: Callable[[float, float], Rank],
    bound_of: Callable[[NodeId], Rank | None],
) -> Iterator[Bounded]:
    """Yield nodes of two lists by their own bounds, reading each list only as far as that takes.

    Args:
        by_rate: Nodes by negative rate.
        by_other: The same nodes by another number that costs.
        threshold: The rank that nodes behind both cursors can't beat.
        bound_of: The rank that one node can't beat; None = it is out.
    """
    seen: set[NodeId] = set()
    ready: list[Bounded] = []
    for (negative_rate, fast), (other, cheap) in zip(by_rate, by_other, strict=True):
        reached = threshold(-negative_rate, other)
        while ready and ready[0][0] <= reached:
            yield heapq.heappop(ready)
        for node_id in (fast, cheap):
            if node_id not in seen:
                seen.add(node_id)
                bound = bound_of(node_id)
                if bound is not None:
                    heapq.heappush(ready, (bound, node_id))
    while ready:
        yield heapq.heappop(ready)


def _busy_stream(situation: Situation) -> Iterator[Bounded]:
    model, policy = situation.model, situation.policy
    if not (policy.may_migrate or situation.waited_too_long):
        return
    ladder = situation.index.busy_by_rate.get(_origin(situation, model), ())
    for negative_rate, node_id in islice(ladder, policy.migration_candidates):
        seconds = situation.parts.start_seconds(0.0, model.file_bytes / -negative_rate) * ROUNDING
        yield (int(seconds / policy.tie_seconds), 1, 0.0, 0, seconds, ""), node_id
