"""Filling memory that nobody uses: which checkpoint a node brings from its own disk into free room. Pure.

A start from memory takes a fraction of one from disk, and free memory does nothing. Rules:
1. Only nodes whose devices have memory of their own, that are open and load nothing: there the pool holds
   checkpoints for starts and nothing else. On a processor's node replicas run from the pool.
2. Only from the node's own disk: nothing is downloaded that nobody asked for.
3. Only into free room, up to `fill_fraction` of the pool; nothing is dropped for it.
4. First what is likely to be asked for, then the rest; of either first what the fewest nodes have in memory
   or get at the moment: nobody finds only disks where there was time for one read, and a burst that starts on
   many nodes finds memory on many. What is left to choose is an order of the node's own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from heapq import nlargest, nsmallest
from itertools import islice

from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.streaming import has_own_memory, streams_on
from services.controller.cluster_view.view import Checkpoint, Model, Node, View
from services.controller.placement.room import never_fits
from stoker.ids import ModelName, NodeId

POOL_SLACK = 1.02
"""A checkpoint takes whole chunks of the pool, a little more than its bytes."""
MAX_LOOKED = 64
"""Checkpoints of a node, in its own order, of which is asked how many nodes have them in memory."""
MAX_HOLDERS = 256
"""Nodes asked for that, at most."""
MAX_NODES = 16
"""Nodes looked at per look, those with most free room."""


def fill(  # noqa: PLR0913 - what the choice depends on, each named by its caller
    view: View,
    names: Mapping[Checkpoint, ModelName],
    chances: Mapping[ModelName, float],
    *,
    taken: AbstractSet[NodeId],
    coming: Iterable[ModelName],
    rests: Mapping[tuple[NodeId, ModelName], float],
    at_once: int,
    fill_fraction: float,
    least_likelihood: float,
) -> list[tuple[ModelName, NodeId]]:
    """Return which checkpoints to bring into which nodes' memory now.

    Args:
        view: The cluster.
        names: A model of each checkpoint.
        chances: How likely models are asked for soon; those not in it were never asked for.
        taken: Nodes that prefetch already.
        coming: What they bring into memory.
        rests: Prefetches that failed lately, by node and model.
        at_once: How many to begin at most.
        fill_fraction: Of a pool, what may be filled.
        least_likelihood: Of what counts as likely.
    """
    index = index_of(view)
    open_nodes = (view.nodes[node_id] for node_id in index.open_nodes if node_id not in taken)
    roomiest = nlargest(MAX_NODES, open_nodes, key=lambda node: (node.pool.free_bytes, node.node_id))
    chosen: list[tuple[ModelName, NodeId]] = []
    for node in roomiest:
        if len(chosen) >= at_once:
            break
        if index.summaries[node.node_id].queued or not has_own_memory(node):
            continue
        room_bytes = node.pool.free_bytes - (1.0 - fill_fraction) * node.pool.total_bytes
        found = [
            model
            for checkpoint, held in node.held.items()
            if (name := names.get(checkpoint)) is not None
            and held.dram_bytes < (model := view.models[name]).file_bytes <= held.disk_bytes
            and pool_bytes(model.file_bytes) - held.dram_bytes <= room_bytes
            and (node.node_id, name) not in rests
            and not streams_on(model, node)
            and never_fits(model, node) is None
        ]
        if found:
            soon = Counter((*coming, *(name for name, _ in chosen)))
            likely = {name for name, chance in chances.items() if chance >= least_likelihood}
            chosen.append((_first(view, node, found, likely, soon).name, node.node_id))
    return chosen


def _first(
    view: View, node: Node, found: list[Model], likely: AbstractSet[ModelName], soon: Mapping[ModelName, int]
) -> Model:
    """Return which of these a node brings into memory first."""
    in_order = nsmallest(MAX_LOOKED, found, key=lambda model: _order(model, node, likely))
    alike = [model for model in in_order if (model.name in likely) == (in_order[0].name in likely)]
    return min(alike, key=lambda model: soon.get(model.name, 0) + copies(view, model))


def pool_bytes(byte_count: int) -> int:
    """Return what bytes of a checkpoint take of a pool, and give back: so a copy makes room for its like."""
    return int(byte_count * POOL_SLACK)


def copies(view: View, model: Model) -> int:
    """Return how many nodes have a checkpoint in memory."""
    holders = islice(index_of(view).holders.get(model.checkpoint), MAX_HOLDERS)
    return sum(_has_in_memory(view.nodes[node_id], model) for node_id in holders)


def is_in_memory(view: View, model: Model) -> bool:
    """Tell whether a node that answers has all of a checkpoint in memory."""
    holders = index_of(view).holders.get(model.checkpoint)
    return any(_has_in_memory(view.nodes[node_id], model) for node_id in holders)


def _has_in_memory(node: Node, model: Model) -> bool:
    held = node.held.get(model.checkpoint)
    return node.reachable and held is not None and held.dram_bytes >= model.file_bytes


def _order(model: Model, node: Node, likely: AbstractSet[ModelName]) -> tuple[bool, bytes]:
    key = f"{node.node_id}/{model.name}".encode()
    return model.name not in likely, hashlib.blake2b(key, digest_size=8).digest()
