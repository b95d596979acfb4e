"""The best node for a model without looking at all of them: best first, exact. Pure.

Each stream gives nodes in ascending order of a rank that none of its later nodes can beat; the search takes
the lowest of all streams until it is above the best found (A* without a goal). Streams, and their bounds:

1. Nodes that hold some of the checkpoint, and those with a preferred label: by what they cost at least.
2. Open nodes with enough free slots, by rung (`index.Rung`), the fastest first: exact if nothing is queued.
3. Open nodes with idle replicas, read from two lists in turn, by rate and by worth: unseen nodes cost at
   least the rate of the one cursor and the worth of the other (Fagin's threshold algorithm, PODS '01).
4. Open nodes with busy replicas that may be moved or drained, the fastest first, at most
   `migration_candidates` of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from services.controller.estimate import LearntParts, bytes_per_second, has_own_memory, learnt_parts
from services.controller.index import Ladder, Rung
from services.controller.options import Option, Rank, best_on, free_option, rank
from services.controller.room import (
    NOTHING_HELD,
    Situation,
    devices_needed,
    fitting_devices,
    has_peer,
)
from services.controller.summary import worth_seconds
from services.controller.view import Model
from stoker.ids import NodeId

SHOWN = 4
"""Options an explanation names at least, where there are as many."""
Bounded = tuple[Rank, NodeId]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best option, if any, and all that were looked at, the best first."""

    best: Option | None
    options: tuple[Option, ...]


def search(situation: Situation, *, exhaustive: bool = False) -> Found:
    """Return the best way to start the situation's model; `exhaustive` looks at every open node."""
    options: list[Option] = []
    best: Rank | None = None
    looked: set[NodeId] = set()
    streams = _every_node(situation) if exhaustive else _streams(situation)
    for bound, node_id in streams:
        if best is not None and bound > best and len(options) >= SHOWN:
            break
        if best is not None and bound > best and len(looked) >= 2 * SHOWN:
            break
        if node_id in looked:
            continue
        looked.add(node_id)
        option = best_on(situation, situation.view.nodes[node_id], free_elsewhere)
        if option is not None:
            options.append(option)
            ranked = rank(option, situation.policy)
            best = ranked if best is None else min(best, ranked)
    options.sort(key=lambda option: rank(option, situation.policy))
    return Found(best=options[0] if options else None, options=tuple(options))


def free_elsewhere(situation: Situation, model: Model, not_on: NodeId, count: int) -> tuple[Option, ...]:
    """Return the best `count` ways to start `model` that disturb nobody, on nodes other than `not_on`."""
    parts = learnt_parts(model, situation.view.measured.get(model.name, ()))
    found: list[tuple[Rank, Option]] = []
    looked = {not_on}
    for bound, node_id in heapq.merge(
        _known_nodes(situation, model), *_free_streams(situation, model, parts)
    ):
        if len(found) >= count and bound > found[count - 1][0]:
            break
        if node_id in looked:
            continue
        looked.add(node_id)
        option = free_option(situation, situation.view.nodes[node_id], model)
        if option is not None and model.required_labels <= situation.view.nodes[node_id].labels:
            found.append((rank(option, situation.policy), option))
            found.sort(key=lambda pair: pair[0])
    return tuple(option for _, option in found[:count])


def _streams(situation: Situation) -> Iterator[Bounded]:
    model = situation.model
    streams = [_known_nodes(situation, model)]
    if not model.required_labels:
        streams += _free_streams(situation, model, situation.parts)
        if situation.may_disturb:
            streams += [_idle_stream(situation), _busy_stream(situation)]
    return heapq.merge(*streams)


def _every_node(situation: Situation) -> Iterator[Bounded]:
    return ((LOWEST, node_id) for node_id in situation.index.open_nodes)


LOWEST: Rank = (-1, 0, 0.0, 0, 0.0, "")


def _known_nodes(situation: Situation, model: Model) -> Iterator[Bounded]:
    """Yield the nodes that are special for the model; those with all required labels where it needs some."""
    index = situation.index
    if model.required_labels:
        carriers = [set(index.labelled.get(label, ())) for label in model.required_labels]
        nodes = set.intersection(*carriers)
    else:
        nodes = set(index.holders.get(model.checkpoint, ()))
        for label in model.preferred_labels:
            nodes.update(index.labelled.get(label, ()))
    parts = learnt_parts(model, situation.view.measured.get(model.name, ()))
    return iter(
        sorted(
            (_known_bound(situation, model, parts, node_id), node_id)
            for node_id in nodes
            if index.summaries[node_id].is_open
        )
    )


def _known_bound(situation: Situation, model: Model, parts: LearntParts, node_id: NodeId) -> Rank:
    """Return what a start on the node costs at least: nothing queued, nobody disturbed."""
    node, summary = situation.view.nodes[node_id], situation.index.summaries[node_id]
    held = node.held.get(model.checkpoint, NOTHING_HELD)
    load_seconds = max(0, model.file_bytes - held.dram_bytes) / max(summary.rates)
    if has_own_memory(node):
        load_seconds = max(load_seconds, model.file_bytes / bytes_per_second(node, "device"))
    seconds = parts.start_seconds(summary.worker_seconds, load_seconds) * (1 - EPSILON)
    victims = 0 if len(summary.free) >= devices_needed(model) else 1
    preferred = len(model.preferred_labels & node.labels)
    return (int(seconds / situation.policy.tie_seconds), victims, 0.0, -preferred, seconds, "")


def _free_streams(situation: Situation, model: Model, parts: LearntParts) -> list[Iterator[Bounded]]:
    origin = "disk" if model.origin == "disk" else _far_origin(situation, model)
    needed = devices_needed(model)
    fits: dict[object, bool] = {}
    streams = []
    for rung, ladder in situation.index.free.items():
        if rung.origin != origin or rung.free < needed:
            continue
        if rung.shape not in fits:
            fits[rung.shape] = _shape_fits(situation, model, ladder)
        if fits[rung.shape]:
            streams.append(_free_stream(situation, model, parts, rung, ladder))
    return streams


def _far_origin(situation: Situation, model: Model) -> str:
    """Return where a node that holds nothing gets the bytes from."""
    return "peer" if has_peer(situation, model, NodeId("")) else "remote"


def _shape_fits(situation: Situation, model: Model, ladder: Ladder) -> bool:
    node = situation.view.nodes[ladder[0][1]]
    if node.architectures and model.architecture not in node.architectures:
        return False
    if 0 < node.pool.total_bytes < model.file_bytes:
        return False
    return len(fitting_devices(model, node)) >= devices_needed(model)


def _free_stream(
    situation: Situation, model: Model, parts: LearntParts, rung: Rung, ladder: Ladder
) -> Iterator[Bounded]:
    for negative_rate, node_id in ladder:
        seconds = parts.start_seconds(rung.worker_seconds, model.file_bytes / -negative_rate)
        yield (int(seconds / situation.policy.tie_seconds), 0, 0.0, 0, seconds, node_id), node_id


def _idle_stream(situation: Situation) -> Iterator[Bounded]:
    """Yield nodes with idle replicas; the bound is the threshold of the two lists read so far."""
    model, index, policy = situation.model, situation.index, situation.policy
    origin = "disk" if model.origin == "disk" else _far_origin(situation, model)
    by_rate, by_worth = index.idle_by_rate.get(origin, ()), index.idle_by_worth
    weight = 1.0 if situation.waited_too_long else policy.hysteresis_ratio
    for (negative_rate, fast), (key, cheap) in zip(by_rate, by_worth, strict=True):
        worth = worth_seconds(key, situation.now_seconds)
        start = situation.parts.start_seconds(policy.stop_seconds, model.file_bytes / -negative_rate)
        seconds = (start + weight * worth) * (1 - EPSILON)
        bound: Rank = (int(seconds / policy.tie_seconds), 1, worth, 0, seconds, "")
        yield bound, fast
        yield bound, cheap


EPSILON = 1e-9
"""Sums of the same terms in another order may differ by a rounding; a bound must not be above its node."""


def _busy_stream(situation: Situation) -> Iterator[Bounded]:
    model, policy = situation.model, situation.policy
    if not (policy.may_migrate or situation.waited_too_long):
        return
    origin = "disk" if model.origin == "disk" else _far_origin(situation, model)
    ladder = situation.index.busy_by_rate.get(origin, ())
    for negative_rate, node_id in islice(ladder, policy.migration_candidates):
        seconds = situation.parts.start_seconds(0.0, model.file_bytes / -negative_rate) * (1 - EPSILON)
        yield (int(seconds / policy.tie_seconds), 1, 0.0, 0, seconds, ""), node_id
