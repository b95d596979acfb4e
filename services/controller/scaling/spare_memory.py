"""Filling memory that nobody uses: which checkpoint a node brings from its own disk into free room. Pure.

A start from memory takes a fraction of one from disk, and free memory does nothing. Rules:
1. Only nodes whose devices have memory of their own, that are open and load nothing: there the pool holds
   checkpoints for starts and nothing else. On a processor's node replicas run from the pool.
2. Only from the node's own disk: nothing is downloaded that nobody asked for.
3. Only into free room, up to `fill_fraction` of the pool; nothing is dropped for it.
4. First what is likely to be asked for, then the rest; of either first what no node has in memory yet or gets
   at the moment, so that nobody finds only disks where there was time for one read. What is left to choose is
   an order of the node's own: nodes that cannot hold everything hold different checkpoints, and bursts that
   start on many nodes find memory on many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from heapq import nlargest, nsmallest

from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.streaming import has_own_memory, streams_on
from services.controller.cluster_view.view import Checkpoint, Model, Node, View
from services.controller.placement.room import never_fits
from stoker.ids import ModelName, NodeId

POOL_SLACK = 1.02
"""A checkpoint takes whole chunks of the pool, a little more than its bytes."""
MAX_LOOKED = 64
"""Checkpoints of a node, in its own order, of which is asked whether a node has them in memory."""
MAX_NODES = 16
"""Nodes looked at per look, those with most free room."""


def fill(  # noqa: PLR0913 - what the choice depends on, each named by its caller
    view: View,
    names: Mapping[Checkpoint, ModelName],
    chances: Mapping[ModelName, float],
    *,
    taken: AbstractSet[NodeId],
    coming: AbstractSet[ModelName],
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
            and model.file_bytes * POOL_SLACK - held.dram_bytes <= room_bytes
            and (node.node_id, name) not in rests
            and not streams_on(model, node)
            and never_fits(model, node) is None
        ]
        if found:
            soon = {*coming, *(name for name, _ in chosen)}
            likely = {name for name, chance in chances.items() if chance >= least_likelihood}
            chosen.append((_first(view, node, found, likely, soon).name, node.node_id))
    return chosen


def _first(
    view: View, node: Node, found: list[Model], likely: AbstractSet[ModelName], soon: AbstractSet[ModelName]
) -> Model:
    """Return which of these a node brings into memory first."""
    in_order = nsmallest(MAX_LOOKED, found, key=lambda model: _order(model, node, likely))
    alike = [model for model in in_order if (model.name in likely) == (in_order[0].name in likely)]
    return next((model for model in alike if _is_nowhere(view, model, soon)), alike[0])


def _is_nowhere(view: View, model: Model, soon: AbstractSet[ModelName]) -> bool:
    """Tell whether no node has the checkpoint in memory, or gets it at the moment."""
    return model.name not in soon and not is_in_memory(view, model)


def is_in_memory(view: View, model: Model) -> bool:
    """Tell whether a node that answers has all of a checkpoint in memory."""
    for node_id in index_of(view).holders.get(model.checkpoint, ()):
        node = view.nodes[node_id]
        held = node.held.get(model.checkpoint)
        if node.reachable and held is not None and held.dram_bytes >= model.file_bytes:
            return True
    return False


def _order(model: Model, node: Node, likely: AbstractSet[ModelName]) -> tuple[bool, bytes]:
    key = f"{node.node_id}/{model.name}".encode()
    return model.name not in likely, hashlib.blake2b(key, digest_size=8).digest()
