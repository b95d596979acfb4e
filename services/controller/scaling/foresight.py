"""What forecasts are for: checkpoints in memory and workers pre-started before anybody asks. Pure.

`foresee(view, before, now_seconds, limits) -> Foreseen`, from the models' arrival histories (`forecast`).

Prefetch, in this order, so that it never thrashes and never is in the way:
0. Models that wait for room are read while they wait (`reading_ahead`); `attend` does no more than that.
1. Wanted are cold models that no node holds in memory, likely to be asked for within the horizon, for which
   memory saves time; those that save most first (likelihood times seconds).
2. A node qualifies that is open, could run the model, loads nothing, and has no prefetch under way.
3. There must be room: free chunks, or checkpoints that nobody holds, whose models are less likely by
   `hysteresis_ratio`; those are named, and dropped before. What nobody holds stays within `memory_fraction`
   of the pool, so that demand finds room without dropping anything.
4. The node that drops least wins, then the one from which it comes soonest. A prefetch that failed rests.
5. What memory is free after that is filled from disk (`spare_memory`); where it is full, what many nodes
   have gives way to what few have (`evening_out`).

How many workers are pre-started is decided by `prestarting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import partial

from services.controller.cluster_view.estimate import start_estimate
from services.controller.cluster_view.fleet import Standing, members_of
from services.controller.cluster_view.forecast import likelihood
from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.lessons import parts_like
from services.controller.cluster_view.streaming import has_own_memory, streams_on
from services.controller.cluster_view.view import Checkpoint, Held, Model, Node, View
from services.controller.placement.room import never_fits
from services.controller.scaling.evening_out import even_out
from services.controller.scaling.prestarting import Pool, pools
from services.controller.scaling.reading_ahead import Memory, Reading, read_ahead
from services.controller.scaling.spare_memory import fill, is_in_memory, pool_bytes
from stoker.ids import ModelName, NodeId
from stoker.units import GB, MB

LIVE = (Standing.STARTING, Standing.READY)
MAX_CANDIDATES = 32
"""Models looked at per look, those that promise most first."""
MAX_NODES = 64
"""Nodes looked at per model."""
SETTLE_SECONDS = 0.5
"""From the end of a prefetch that went well to the next look: its node need not stand still meanwhile."""
REPORTED_SECONDS = 5.0
"""After this a node has surely reported what a prefetch has brought it."""
RESTS_SECONDS = 60.0
"""A prefetch that failed is not tried again on that node before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What forecasts may do.

    Attributes:
        memory_fraction: Of a node's pool, what unused checkpoints may fill by prefetching; 0 = no prefetches.
        worker_memory_bytes: Per node, for pre-started workers; 0 = agents do as they are configured.
        bytes_per_worker: What one takes.
        horizon_seconds: How far ahead a model's next request is looked for.
        least_likelihood: Of that request; below it nothing is prefetched.
        least_gain_seconds: What memory must save of the start.
        fill_fraction: Of a pool, what `spare_memory` may fill, likely to be used or not; 0 = nothing.
        hysteresis_ratio: A checkpoint makes room only for one this many times as likely.
        at_once: Prefetches under way, over all nodes; one per node.
        confidence: That a start finds a pre-started worker.
        hold_seconds: A number of workers that is too high stays this long.
    """

    memory_fraction: float = 0.5
    worker_memory_bytes: int = 4 * GB
    bytes_per_worker: int = 600 * MB
    horizon_seconds: float = 300.0
    least_likelihood: float = 0.3
    least_gain_seconds: float = 0.1
    fill_fraction: float = 0.9
    hysteresis_ratio: float = 2.0
    at_once: int = 4
    confidence: float = 0.95
    hold_seconds: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetch:
    """Bring a model's checkpoint into a node's memory.

    Attributes:
        model: Whose.
        node_id: Where.
        drop: Models whose checkpoints are dropped there before: less likely, and held by nobody.
        likelihood: That it is asked for within the horizon.
        gain_seconds: What its start is expected to save then.
    """

    model: ModelName
    node_id: NodeId
    drop: tuple[ModelName, ...]
    likelihood: float
    gain_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """What is wanted as of one look, and what the next one must know.

    Attributes:
        prefetches: To begin now.
        pools: Warm workers wanted, by node; a node that is not in it does as it is configured.
        under_way: What is being prefetched, by node: one at a time.
        rests: Until when a prefetch that has ended is not ordered again, by node and model.
    """

    prefetches: tuple[Prefetch, ...] = ()
    pools: Mapping[NodeId, Pool] = field(default_factory=dict)
    under_way: Mapping[NodeId, ModelName] = field(default_factory=dict)
    rests: Mapping[tuple[NodeId, ModelName], float] = field(default_factory=dict)


def foresee(view: View, before: Foreseen, now_seconds: float, limits: Limits) -> Foreseen:
    """Decide what to prepare now.

    Args:
        view: The cluster.
        before: The last look's result, with what has ended since taken out of `under_way`.
        now_seconds: The view's clock.
        limits: What is allowed.
    """
    rests = {key: until for key, until in before.rests.items() if until > now_seconds}
    prefetches = _prefetches(view, before.under_way, rests, now_seconds, limits)
    return Foreseen(
        prefetches=prefetches,
        pools=pools(
            view,
            before.pools,
            now_seconds,
            memory_bytes=limits.worker_memory_bytes,
            bytes_per_worker=limits.bytes_per_worker,
            confidence=limits.confidence,
            hold_seconds=limits.hold_seconds,
        ),
        under_way={**before.under_way, **{found.node_id: found.model for found in prefetches}},
        rests=rests,
    )


def attend(view: View, before: Foreseen, now_seconds: float, limits: Limits) -> Foreseen:
    """Decide only what to read for models that wait for room: a look in between, which costs little."""
    rests = {key: until for key, until in before.rests.items() if until > now_seconds}
    prefetches: tuple[Prefetch, ...] = ()
    if view.refusals and limits.memory_fraction > 0:
        names = {view.models[name].checkpoint: name for name in sorted(view.models)}
        memory = Memory(
            view=view,
            now_seconds=now_seconds,
            rests=rests,
            names=names,
            chance=partial(_chance, view, now_seconds, limits),
            most_chance=1.0 / limits.hysteresis_ratio,
        )
        prefetches = tuple(_for_who_waits(memory, set(before.under_way), limits))
    return replace(
        before,
        prefetches=prefetches,
        under_way={**before.under_way, **{found.node_id: found.model for found in prefetches}},
        rests=rests,
    )


def has_ended(before: Foreseen, node_id: NodeId, now_seconds: float, *, failed: bool) -> Foreseen:
    """Return what the next look must know once the prefetch on a node has ended.

    A failed one rests; one that went well is not ordered again before the node has reported what it holds.
    """
    left = dict(before.under_way)
    name = left.pop(node_id, None)
    if name is None:
        return before
    rest_seconds = RESTS_SECONDS if failed else REPORTED_SECONDS
    rests = {**before.rests, (node_id, name): now_seconds + rest_seconds}
    return replace(before, under_way=left, rests=rests)


# --- checkpoints ---


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What is the same for every model and node of one look; `names` has a checkpoint's most likely model."""

    view: View
    limits: Limits
    chances: Mapping[ModelName, float]
    names: Mapping[Checkpoint, ModelName]


def _prefetches(
    view: View,
    under_way: Mapping[NodeId, ModelName],
    rests: Mapping[tuple[NodeId, ModelName], float],
    now_seconds: float,
    limits: Limits,
) -> tuple[Prefetch, ...]:
    if limits.memory_fraction <= 0:
        return ()
    chances = {
        name: likelihood(arrivals, now_seconds, limits.horizon_seconds)
        for name, arrivals in view.arrivals.items()
        if name in view.models
    }
    by_chance = sorted(view.models, key=lambda name: chances.get(name, 0.0))
    look = _Look(
        view=view,
        limits=limits,
        chances=chances,
        names={view.models[name].checkpoint: name for name in by_chance},
    )
    memory = Memory(
        view=view,
        now_seconds=now_seconds,
        rests=rests,
        names=look.names,
        chance=lambda name: chances.get(name, 0.0),
        most_chance=1.0 / limits.hysteresis_ratio,
    )
    busy = set(under_way)
    chosen = list(_for_who_waits(memory, busy, limits))
    busy.update(found.node_id for found in chosen)
    for name in _candidates(look):
        if len(busy) >= limits.at_once:
            break
        found = [
            option
            for node in _nodes_for(view, view.models[name], busy)
            if (node.node_id, name) not in rests and (option := _on_node(look, name, node)) is not None
        ]
        if found:
            best = min(found, key=lambda option: (len(option.drop), option.gain_seconds, option.node_id))
            chosen.append(best)
            busy.add(best.node_id)
    coming = (*under_way.values(), *(found.model for found in chosen))
    filling = tuple(_filling(look, busy, coming, rests))
    if limits.fill_fraction <= 0:
        return (*chosen, *filling)
    busy.update(found.node_id for found in filling)
    evened = even_out(
        memory,
        taken=busy,
        coming=(*coming, *(found.model for found in filling)),
        at_most=limits.at_once - len(busy),
    )
    return (*chosen, *filling, *(_prefetch_of(memory, reading) for reading in evened))


def _for_who_waits(memory: Memory, busy: AbstractSet[NodeId], limits: Limits) -> Iterator[Prefetch]:
    """Yield what models that wait for room need; there may be as many of these as of all others."""

    def saves(model: Model, node: Node) -> bool:
        return _gain_seconds(memory.view, model, node) >= limits.least_gain_seconds

    at_most = 2 * limits.at_once - len(busy)
    for reading in read_ahead(memory, taken=busy, saves=saves, at_most=at_most):
        yield _prefetch_of(memory, reading)


def _prefetch_of(memory: Memory, reading: Reading) -> Prefetch:
    view = memory.view
    return Prefetch(
        model=reading.name,
        node_id=reading.node_id,
        drop=reading.drop,
        likelihood=memory.chance(reading.name),
        gain_seconds=_gain_seconds(view, view.models[reading.name], view.nodes[reading.node_id]),
    )


def _chance(view: View, now_seconds: float, limits: Limits, name: ModelName) -> float:
    arrivals = view.arrivals.get(name)
    return likelihood(arrivals, now_seconds, limits.horizon_seconds) if arrivals is not None else 0.0


def _filling(
    look: _Look,
    busy: set[NodeId],
    coming: Iterable[ModelName],
    rests: Mapping[tuple[NodeId, ModelName], float],
) -> Iterable[Prefetch]:
    view, limits = look.view, look.limits
    if limits.fill_fraction <= 0:
        return
    for name, node_id in fill(
        view,
        look.names,
        look.chances,
        taken=busy,
        coming=coming,
        rests=rests,
        at_once=limits.at_once - len(busy),
        fill_fraction=limits.fill_fraction,
        least_likelihood=limits.least_likelihood,
    ):
        yield Prefetch(
            model=name,
            node_id=node_id,
            drop=(),
            likelihood=look.chances.get(name, 0.0),
            gain_seconds=_gain_seconds(view, view.models[name], view.nodes[node_id]),
        )


def _candidates(look: _Look) -> list[ModelName]:
    """Return the models worth having in memory, those that promise most first."""
    view = look.view
    promising = [
        (-chance * view.models[name].file_bytes, name)
        for name, chance in look.chances.items()
        if chance >= look.limits.least_likelihood
        and not is_in_memory(view, view.models[name])
        and not any(found.standing in LIVE for found in members_of(view, name))
    ]
    return [name for _, name in sorted(promising)[:MAX_CANDIDATES]]


def _nodes_for(view: View, model: Model, busy: set[NodeId]) -> Iterable[Node]:
    """Return the nodes that may take a prefetch, those that hold the checkpoint on disk first."""
    index = index_of(view)
    holders = index.holders.get(model.checkpoint)

    def promises(node_id: NodeId) -> tuple[bool, int, NodeId]:
        return (node_id not in holders, -view.nodes[node_id].pool.free_bytes, node_id)

    open_nodes = [node_id for node_id in index.open_nodes if node_id not in busy]
    for node_id in sorted(open_nodes, key=promises)[:MAX_NODES]:
        node, summary = view.nodes[node_id], index.summaries[node_id]
        fits = never_fits(model, node) is None and not streams_on(model, node)
        if not summary.queued and fits and node.pool.total_bytes:
            yield node


def _on_node(look: _Look, name: ModelName, node: Node) -> Prefetch | None:
    """Return the prefetch of a model to a node; None where there is no room for it, or it saves nothing."""
    model, limits = look.view.models[name], look.limits
    gain_seconds = _gain_seconds(look.view, model, node)
    if gain_seconds < limits.least_gain_seconds:
        return None
    missing_bytes = pool_bytes(model.file_bytes) - node.held.get(model.checkpoint, Held()).dram_bytes
    idle_bytes = sum(found.dram_bytes for found in node.held.values() if not found.leases)
    over_bytes = max(
        missing_bytes - node.pool.free_bytes,
        idle_bytes + missing_bytes - int(limits.memory_fraction * node.pool.total_bytes),
    )
    drop: list[ModelName] = []
    for dropped, dram_bytes in _droppable(look, node, name):
        if over_bytes <= 0:
            break
        drop.append(dropped)
        over_bytes -= pool_bytes(dram_bytes)
    if over_bytes > 0:
        return None
    return Prefetch(
        model=name,
        node_id=node.node_id,
        drop=tuple(drop),
        likelihood=look.chances[name],
        gain_seconds=gain_seconds,
    )


def _droppable(look: _Look, node: Node, name: ModelName) -> list[tuple[ModelName, int]]:
    """Return the models whose checkpoints may be dropped for this one, the least likely first."""
    idle = [
        (look.chances.get(other, 0.0), other, held.dram_bytes)
        for checkpoint, held in node.held.items()
        if (other := look.names.get(checkpoint)) is not None
        and checkpoint != look.view.models[name].checkpoint
        and held.dram_bytes
        and not held.leases
    ]
    most = look.chances[name] / look.limits.hysteresis_ratio
    return [(other, dram_bytes) for chance, other, dram_bytes in sorted(idle) if chance <= most]


def _gain_seconds(view: View, model: Model, node: Node) -> float:
    """Return what a start there takes less once the checkpoint is in memory."""
    parts = parts_like(view, model)
    estimate = start_estimate(model, node, parts=parts, loading_bytes=0, starting_workers=0)
    on_device = estimate.stage_seconds.get("device", 0.0) if has_own_memory(node) else 0.0
    return parts.start_seconds(0.0, estimate.load_seconds) - parts.start_seconds(0.0, on_device)
