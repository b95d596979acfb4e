"""Evening out what is in memory: where it is full, a copy of which there are several gives way. Pure.

A burst that starts on many nodes leaves its checkpoint in the memory of all of them, and takes from all of
them the same ones, used longest ago: the next burst is of one of those, and finds nothing but disks. Rules:

1. Only nodes whose devices have memory of their own, that are open and load nothing; a few per look, in turn.
2. A copy gives way to a checkpoint that at least two nodes fewer have in memory, those on their way counted.
   So it ends: each exchange makes the numbers more alike.
3. Copies that somebody holds stay, and those of models that run or are waited for.
4. Only from the node's own disk. What the fewest nodes have comes first, of these what is likelier; what the
   most nodes have goes first, of these what is less likely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from itertools import islice

from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.streaming import has_own_memory, streams_on
from services.controller.cluster_view.view import Node
from services.controller.placement.room import never_fits
from services.controller.scaling.reading_ahead import (
    Memory,
    Reading,
    dropped,
    is_needed,
    is_only_on_disk,
    lacked_bytes,
)
from services.controller.scaling.spare_memory import copies
from stoker.ids import ModelName, NodeId

MAX_NODES = 4
"""Nodes looked at per look."""
MAX_TRIED = 4
"""Checkpoints tried on a node, those that the fewest have."""
LEAST_DIFFERENCE = 2
"""Of copies: with less the two would only change places."""


def even_out(
    memory: Memory,
    *,
    taken: AbstractSet[NodeId],
    coming: Iterable[ModelName],
    at_most: int,
) -> Iterator[Reading]:
    """Yield what to read in place of what.

    Args:
        memory: What is there.
        taken: Nodes that read something already.
        coming: What they bring into memory.
        at_most: How many to begin.
    """
    view, index = memory.view, index_of(memory.view)
    change = Counter(coming)
    turns = max(1, -(-len(index.open_nodes) // MAX_NODES))
    first = int(memory.now_seconds) % turns * MAX_NODES
    for node_id in islice(index.open_nodes, first, first + MAX_NODES):
        if at_most <= 0:
            return
        node = view.nodes[node_id]
        if node_id in taken or index.summaries[node_id].queued or not has_own_memory(node):
            continue
        reading = _exchange(memory, node, change)
        if reading is not None:
            at_most -= 1
            change[reading.name] += 1
            change.subtract(reading.drop)
            yield reading


def _exchange(memory: Memory, node: Node, change: Mapping[ModelName, int]) -> Reading | None:
    """Return what a node should have instead of what; None = nothing.

    `change` is by how many the copies of a model are about to be more, or fewer, than the view says.
    """
    view = memory.view

    def count(name: ModelName) -> int:
        return copies(view, view.models[name]) + change.get(name, 0)

    there: list[tuple[int, float, ModelName, int]] = []
    absent: list[tuple[int, float, ModelName]] = []
    for checkpoint, held in node.held.items():
        name = memory.names.get(checkpoint)
        if name is None:
            continue
        model = view.models[name]
        if is_only_on_disk(model, held):
            if memory.may_read(name, node.node_id) and not streams_on(model, node):
                absent.append((count(name), -memory.chance(name), name))
        elif held.dram_bytes and not held.leases and not is_needed(view, name):
            there.append((-count(name), memory.chance(name), name, held.dram_bytes))
    there.sort()
    for fewest, _, name in sorted(absent)[:MAX_TRIED]:
        model = view.models[name]
        if never_fits(model, node) is None:
            plenty = [(other, size) for most, _, other, size in there if -most - fewest >= LEAST_DIFFERENCE]
            drop = dropped(lacked_bytes(model, node), plenty)
            if drop:
                return Reading(name=name, node_id=node.node_id, drop=drop)
    return None
