"""Reading ahead for who waits for room: the checkpoint is in memory when the room is there. Pure.

While all devices serve somebody, disks do nothing. Rules:

1. Looked at are models that requests wait for, that lack replicas and were refused them; who waits longest
   comes first.
2. Each is read on as many nodes as it lacks replicas: first where room is being made for it, then on any
   that could take it. Among more than `MAX_NODES` only where room is being made: elsewhere it is a guess.
3. Only from a node's own disk, where that saves time; one at a time per node. Stores give way to starts.
4. Where memory is full, copies go that nobody holds, of models that neither run nor are waited for: the least
   likely per copy first, and none as likely as half (`hysteresis_ratio`). A start from disk drops some, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from heapq import nsmallest

from services.controller.cluster_view.attention import EMPTY, asked_for
from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.streaming import streams_on
from services.controller.cluster_view.view import Checkpoint, Held, Model, Node, View
from services.controller.placement.room import never_fits
from services.controller.scaling.spare_memory import copies, pool_bytes
from stoker.ids import ModelName, NodeId

Dropped = tuple[ModelName, ...] | None
"""What goes for a checkpoint; None = too little may."""
MAX_WAITING = 32
"""Models looked at per look, those that wait longest."""
MAX_NODES = 16
"""Open nodes of a cluster in which any of them may be the one that has room next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What choosing between checkpoints in memory needs.

    Attributes:
        view: The cluster.
        now_seconds: The view's clock.
        rests: Until when a prefetch that has ended is not ordered again, by node and model.
        names: A model of each checkpoint.
        chance: Tells how likely a model is asked for soon.
        most_chance: Per copy, of what may go for a model that is waited for.
    """

    view: View
    now_seconds: float
    rests: Mapping[tuple[NodeId, ModelName], float]
    names: Mapping[Checkpoint, ModelName]
    chance: Callable[[ModelName], float]
    most_chance: float

    def may_read(self, name: ModelName, node_id: NodeId) -> bool:
        """Tell whether the last prefetch of a model to a node is long enough ago."""
        return (node_id, name) not in self.rests


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A checkpoint to bring into a node's memory, and what is dropped there for it."""

    name: ModelName
    node_id: NodeId
    drop: tuple[ModelName, ...]


def read_ahead(
    memory: Memory,
    *,
    taken: AbstractSet[NodeId],
    saves: Callable[[Model, Node], bool],
    at_most: int,
) -> Iterator[Reading]:
    """Yield what to read for models that wait for room, each on a node of its own.

    Args:
        memory: What is there.
        taken: Nodes that read something already.
        saves: Tells whether a start of the model there is sooner from memory.
        at_most: How many to begin.
    """
    view, busy = memory.view, set(taken)
    for name in _waiting(view):
        model, left = view.models[name], lacking(view, name)
        for node, is_meant in _nodes(view, model):
            if len(busy) - len(taken) >= at_most or left <= 0:
                break
            if _is_there_or_coming(view, model, node):
                left -= is_meant
            elif node.node_id not in busy and memory.may_read(name, node.node_id) and saves(model, node):
                drop = _room_for(memory, model, node)
                if drop is not None:
                    busy.add(node.node_id)
                    left -= 1
                    yield Reading(name=name, node_id=node.node_id, drop=drop)


def lacking(view: View, name: ModelName) -> int:
    """Return how many replicas the requests of a deployed model fill beyond those it has or is getting."""
    model, tally = view.models[name], index_of(view).tallies.get(name, EMPTY)
    loaded = -(-tally.sessions // model.concurrency)
    return min(model.max_replicas, max(asked_for(view, model), loaded)) - tally.live


def is_needed(view: View, name: ModelName) -> bool:
    """Tell whether a model runs or is waited for, so that its copies stay where they are."""
    return name in view.demands or index_of(view).tallies.get(name, EMPTY).live > 0


def dropped(missing_bytes: int, copies_by_worth: Sequence[tuple[ModelName, int]]) -> Dropped:
    """Return which of these copies go, the first ones first, so that so many bytes are free."""
    chosen: list[ModelName] = []
    for name, dram_bytes in copies_by_worth:
        if missing_bytes <= 0:
            break
        chosen.append(name)
        missing_bytes -= pool_bytes(dram_bytes)
    return tuple(chosen) if missing_bytes <= 0 else None


def lacked_bytes(model: Model, node: Node) -> int:
    """Return what a node's free memory lacks to take the rest of a checkpoint; 0 or less = nothing."""
    held = node.held.get(model.checkpoint, Held())
    return pool_bytes(model.file_bytes) - held.dram_bytes - node.pool.free_bytes


def is_only_on_disk(model: Model, held: Held) -> bool:
    """Tell whether a node has all of a checkpoint on its disk and not in memory."""
    return held.dram_bytes < model.file_bytes <= held.disk_bytes


def _waiting(view: View) -> list[ModelName]:
    """Return the models that were refused a replica that requests want, who waits longest first."""
    waiting = [
        (demand.since_seconds if demand is not None else refusal.at_seconds, name)
        for name, refusal in view.refusals.items()
        if name in view.models and not refusal.code and lacking(view, name) > 0
        for demand in (view.demands.get(name),)
    ]
    return [name for _, name in nsmallest(MAX_WAITING, waiting)]


def _nodes(view: View, model: Model) -> Iterator[tuple[Node, bool]]:
    """Yield the nodes that may have room for the model soon; True = it is being made there for it."""
    index = index_of(view)
    meant = frozenset(index.leaving.get(model.name, ()))
    for node_id in sorted(meant):
        if index.summaries[node_id].is_open and never_fits(model, view.nodes[node_id]) is None:
            yield view.nodes[node_id], True
    if len(index.open_nodes) <= MAX_NODES:
        for node_id in index.open_nodes:
            if node_id not in meant and never_fits(model, view.nodes[node_id]) is None:
                yield view.nodes[node_id], False


def _is_there_or_coming(view: View, model: Model, node: Node) -> bool:
    """Tell whether a node has the checkpoint in memory, is loading it, or can't read it ahead."""
    held = node.held.get(model.checkpoint, Held())
    is_loading = model.checkpoint in index_of(view).summaries[node.node_id].loading
    return is_loading or not is_only_on_disk(model, held) or streams_on(model, node)


def _room_for(memory: Memory, model: Model, node: Node) -> Dropped:
    """Return what goes so that the checkpoint fits; None where too little may."""
    missing_bytes = lacked_bytes(model, node)
    if missing_bytes <= 0:
        return ()
    view = memory.view
    found = []
    for checkpoint, held in node.held.items():
        other = memory.names.get(checkpoint)
        if other is None or not held.dram_bytes or held.leases or checkpoint == model.checkpoint:
            continue
        count = max(1, copies(view, view.models[other]))
        worth = memory.chance(other) / count
        if worth <= memory.most_chance and not is_needed(view, other):
            arrivals = view.arrivals.get(other)
            last_seconds = arrivals.last_seconds if arrivals is not None else 0.0
            found.append((worth, -count, last_seconds, other, held.dram_bytes))
    return dropped(missing_bytes, [(other, dram_bytes) for *_, other, dram_bytes in sorted(found)])
