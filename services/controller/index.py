"""Summaries that keep decisions fast: made from a view, and kept current by `fold`. Pure.

A decision over thousands of nodes looks at few of them, because nodes are kept sorted by what makes a start
fast. Rules:

1. An index says nothing that the view does not: `index_of(view)` makes the same one anew (property-tested).
2. Everything in it is immutable; a change shares all but what it touches with the index before.
3. It knows no policy and no time, so that neither makes it stale.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import TypeVar

from immutables import Map

from services.controller.attention import EMPTY, Mark, Tally, due_of, mark_of
from services.controller.fleet import member
from services.controller.summary import ORIGINS, Shape, Summary, shape_of, summary_of
from services.controller.view import Checkpoint, Node, Reservation, View
from stoker.ids import ModelName, NodeId, ReplicaId

T = TypeVar("T")
K = TypeVar("K")
Item = TypeVar("Item", bound=str | tuple[float, str])
"""What lists are sorted by: an id, or a number and an id."""
Ladder = tuple[tuple[float, NodeId], ...]
"""Nodes in ascending order of a number: the first is the best."""
Members = Map[NodeId, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """Nodes that differ in nothing but their rates, and in how long a worker takes where none waits.

    Attributes:
        shape: What they can ever take.
        free: How many free slots each has.
        waits: A pre-started worker waits there.
        queued: Bytes wait before a stage.
    """

    shape: Shape
    free: int
    waits: bool
    queued: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Summaries of a view.

    Attributes:
        on_node: Reservations of each node, sorted.
        of_model: Reservations of each model, sorted.
        summaries: Of every node.
        holders: Nodes whose stores hold some of a checkpoint.
        free: Open nodes with free slots, by origin and rung, the fastest first; by negative rate.
        free_by_worker: Those where no worker waits, by the time that one takes.
        marks: What each reserved replica adds to its model's tally.
        tallies: Of every model with replicas.
        idle_by_rate: Open nodes with an idle replica, the fastest first, by origin.
        idle_by_worth: The same, by `worth_key` of the replica cheapest to lose.
        busy_by_rate: Open nodes with a replica that serves sessions, the fastest first, by origin.
        leaving: Nodes with replicas on their way out.
        orphaned: Nodes with replicas that nobody reserved.
        homeless: Nodes that have reservations, and are not in the cluster.
        labelled: Nodes by label.
        open_nodes: Ids, sorted.
        last_seen: Every node by the time of its last report.
        due: When something about a model may have to be done next, by time and name.
        due_at: The same, by name.
        shapes: How many nodes there are of each shape.
    """

    on_node: Map[NodeId, tuple[ReplicaId, ...]] = field(default_factory=Map)
    of_model: Map[ModelName, tuple[ReplicaId, ...]] = field(default_factory=Map)
    summaries: Map[NodeId, Summary] = field(default_factory=Map)
    holders: Map[Checkpoint, Members] = field(default_factory=Map)
    free: Map[str, Map[Rung, Ladder]] = field(default_factory=Map)
    free_by_worker: Map[Rung, Ladder] = field(default_factory=Map)
    marks: Map[ReplicaId, Mark] = field(default_factory=Map)
    tallies: Map[ModelName, Tally] = field(default_factory=Map)
    idle_by_rate: Map[str, Ladder] = field(default_factory=Map)
    idle_by_worth: Ladder = ()
    busy_by_rate: Map[str, Ladder] = field(default_factory=Map)
    leaving: Members = field(default_factory=Map)
    orphaned: Members = field(default_factory=Map)
    homeless: Members = field(default_factory=Map)
    labelled: Map[tuple[str, str], Members] = field(default_factory=Map)
    open_nodes: tuple[NodeId, ...] = ()
    last_seen: Ladder = ()
    due: tuple[tuple[float, ModelName], ...] = ()
    due_at: Map[ModelName, float] = field(default_factory=Map)
    shapes: Map[Shape, int] = field(default_factory=Map)


def index_of(view: View) -> Index:
    """Return the view's index, made anew when it has none."""
    if view.index is not None:
        return view.index
    on_node: dict[NodeId, list[ReplicaId]] = {}
    of_model: dict[ModelName, list[ReplicaId]] = {}
    for replica_id in sorted(view.reservations):
        reservation = view.reservations[replica_id]
        on_node.setdefault(reservation.node_id, []).append(replica_id)
        of_model.setdefault(reservation.model, []).append(replica_id)
    index = Index(
        on_node=Map({key: tuple(found) for key, found in on_node.items()}),
        of_model=Map({key: tuple(found) for key, found in of_model.items()}),
    )
    for replica_id in sorted(view.reservations):
        index = _remarked(index, view, replica_id, view.reservations[replica_id].model)
    for node_id in sorted(view.nodes):
        index = _node_changed(index, None, view, node_id)
    for node_id in sorted(on_node):
        index = _rehomed(index, view, node_id)
    return _models_changed(index, view, {*view.models, *of_model, *view.demands})


def indexed(view: View) -> View:
    """Return the view with its index."""
    return view if view.index is not None else replace(view, index=index_of(view))


def reindexed(
    before: View,
    after: View,
    *,
    nodes: AbstractSet[NodeId],
    models: AbstractSet[ModelName],
    reservations: AbstractSet[ReplicaId],
) -> View:
    """Return `after` with the index of `before` brought up to date.

    Args:
        before: With its index.
        after: What an event made of it.
        nodes: Those that may have changed, or whose replicas or reservations may have.
        models: Those whose definition, demand, failures or replicas may have changed.
        reservations: Those that may have come or gone.
    """
    index = index_of(before)
    for replica_id in reservations:
        index = _reservation_changed(index, before, after, replica_id)
    for node_id in nodes:
        index = _node_changed(index, before, after, node_id)
    return replace(after, index=_models_changed(index, after, models))


def reservations_on(view: View, index: Index, node_id: NodeId) -> tuple[Reservation, ...]:
    """Return a node's reservations, by replica id."""
    return tuple(view.reservations[replica_id] for replica_id in index.on_node.get(node_id, ()))


def reservations_of(view: View, index: Index, name: ModelName) -> tuple[Reservation, ...]:
    """Return a model's reservations, by replica id."""
    return tuple(view.reservations[replica_id] for replica_id in index.of_model.get(name, ()))


def _reservation_changed(index: Index, before: View, after: View, replica_id: ReplicaId) -> Index:
    was, now = before.reservations.get(replica_id), after.reservations.get(replica_id)
    found = was or now
    if found is None:
        return index
    index = _remarked(index, after, replica_id, found.model)
    if (was is None) == (now is None):
        return index  # neither its node nor its model ever changes
    index = replace(
        index,
        on_node=_listed(index.on_node, found.node_id, replica_id, present=now is not None),
        of_model=_listed(index.of_model, found.model, replica_id, present=now is not None),
    )
    return _rehomed(index, after, found.node_id)


def _remarked(index: Index, view: View, replica_id: ReplicaId, name: ModelName) -> Index:
    reservation = view.reservations.get(replica_id)
    was = index.marks.get(replica_id)
    now = mark_of(view, member(view, reservation)) if reservation is not None else None
    if was == now:
        return index
    tally = index.tallies.get(name, EMPTY)
    tally = tally.plus(was, -1) if was is not None else tally
    tally = tally.plus(now, 1) if now is not None else tally
    return replace(
        index,
        marks=index.marks.set(replica_id, now) if now is not None else _dropped(index.marks, replica_id),
        tallies=index.tallies.set(name, tally) if tally.replicas else _dropped(index.tallies, name),
    )


def _rehomed(index: Index, view: View, node_id: NodeId) -> Index:
    is_homeless = node_id in index.on_node and node_id not in view.nodes
    if is_homeless == (node_id in index.homeless):
        return index
    changed = index.homeless.set(node_id, None) if is_homeless else index.homeless.delete(node_id)
    return replace(index, homeless=changed)


def _listed(
    lists: Map[K, tuple[Item, ...]], key: K, item: Item, *, present: bool
) -> Map[K, tuple[Item, ...]]:
    items = _with_item(lists.get(key, ()), item) if present else _without_item(lists.get(key, ()), item)
    return lists.set(key, items) if items else _dropped(lists, key)


def _node_changed(index: Index, before: View | None, after: View, node_id: NodeId) -> Index:
    was, now = before.nodes.get(node_id) if before else None, after.nodes.get(node_id)
    was_summary = index.summaries.get(node_id)
    index = _rehomed(index, after, node_id)
    now_summary = (
        summary_of(after, node_id, reservations_on(after, index, node_id)) if now is not None else None
    )
    index = replace(
        index,
        summaries=(
            index.summaries.set(node_id, now_summary)
            if now_summary is not None
            else _dropped(index.summaries, node_id)
        ),
        last_seen=_reseen(index.last_seen, was, now),
    )
    if was is None or now is None or was.held != now.held:
        index = _reheld(index, was, now, node_id)
    if (was.labels if was else None) != (now.labels if now else None):
        index = _relabelled(index, was, now, node_id)
    was_shape, now_shape = shape_of(was) if was else None, shape_of(now) if now else None
    if (was_shape, was_summary) == (now_shape, now_summary):
        return index
    if was_shape != now_shape:
        index = replace(index, shapes=_recounted(index.shapes, was_shape, now_shape))
    if was_shape is not None and was_summary is not None:
        index = _reranked(index, was_shape, was_summary, node_id, present=False)
    if now_shape is not None and now_summary is not None:
        index = _reranked(index, now_shape, now_summary, node_id, present=True)
    return index


def _reranked(index: Index, shape: Shape, summary: Summary, node_id: NodeId, *, present: bool) -> Index:
    """Put the node into, or take it out of, every list its summary belongs to."""
    free, idle, busy = index.free, index.idle_by_rate, index.busy_by_rate
    worth, open_nodes = index.idle_by_worth, index.open_nodes
    leaving, orphaned = index.leaving, index.orphaned
    if summary.is_leaving:
        leaving = leaving.set(node_id, None) if present else _dropped(leaving, node_id)
    if summary.has_orphans:
        orphaned = orphaned.set(node_id, None) if present else _dropped(orphaned, node_id)
    rung = (
        Rung(shape=shape, free=len(summary.free), waits=not summary.worker_seconds, queued=summary.queued)
        if summary.is_open and summary.free
        else None
    )
    by_worker = index.free_by_worker
    if rung is not None and not rung.waits:
        by_worker = _reladdered(by_worker, rung, (summary.worker_seconds, node_id), present=present)
    if summary.is_open:
        open_nodes = _changed(open_nodes, node_id, present=present)
        for origin, rate in zip(ORIGINS, summary.rates, strict=True):
            rank = (-rate, node_id)
            if rung is not None:
                rungs = _reladdered(free.get(origin, Map()), rung, rank, present=present)
                free = free.set(origin, rungs) if rungs else _dropped(free, origin)
            if summary.worth_keys:
                idle = _reladdered(idle, origin, rank, present=present)
            if summary.has_busy:
                busy = _reladdered(busy, origin, rank, present=present)
        if summary.worth_keys:
            worth = _changed(worth, (summary.worth_keys[0][0], node_id), present=present)
    return replace(
        index,
        free=free,
        free_by_worker=by_worker,
        idle_by_rate=idle,
        busy_by_rate=busy,
        idle_by_worth=worth,
        open_nodes=open_nodes,
        leaving=leaving,
        orphaned=orphaned,
    )


def _reladdered(
    ladders: Map[K, Ladder], key: K, rank: tuple[float, NodeId], *, present: bool
) -> Map[K, Ladder]:
    ladder = _changed(ladders.get(key, ()), rank, present=present)
    return ladders.set(key, ladder) if ladder else _dropped(ladders, key)


def _reseen(last_seen: Ladder, was: Node | None, now: Node | None) -> Ladder:
    if was is not None:
        last_seen = _without_item(last_seen, (was.last_seen_seconds, was.node_id))
    if now is not None:
        last_seen = _with_item(last_seen, (now.last_seen_seconds, now.node_id))
    return last_seen


def _reheld(index: Index, was: Node | None, now: Node | None, node_id: NodeId) -> Index:
    holders = index.holders
    had = was.held.keys() if was else frozenset()
    has = now.held.keys() if now else frozenset()
    for checkpoint in has - had:
        holders = holders.set(checkpoint, holders.get(checkpoint, Map()).set(node_id, None))
    for checkpoint in had - has:
        left = _dropped(holders[checkpoint], node_id)
        holders = holders.set(checkpoint, left) if left else holders.delete(checkpoint)
    return replace(index, holders=holders)


def _relabelled(index: Index, was: Node | None, now: Node | None, node_id: NodeId) -> Index:
    labelled = index.labelled
    had = was.labels if was else frozenset()
    has = now.labels if now else frozenset()
    for label in has - had:
        labelled = labelled.set(label, labelled.get(label, Map()).set(node_id, None))
    for label in had - has:
        left = _dropped(labelled[label], node_id)
        labelled = labelled.set(label, left) if left else labelled.delete(label)
    return replace(index, labelled=labelled)


def _recounted(shapes: Map[Shape, int], was: Shape | None, now: Shape | None) -> Map[Shape, int]:
    if now is not None:
        shapes = shapes.set(now, shapes.get(now, 0) + 1)
    if was is not None:
        left = shapes[was] - 1
        shapes = shapes.set(was, left) if left else shapes.delete(was)
    return shapes


def _models_changed(index: Index, view: View, names: Iterable[ModelName]) -> Index:
    due, due_at = index.due, index.due_at
    for name in names:
        was = due_at.get(name)
        now = due_of(view, name, index.tallies.get(name, EMPTY))
        if was == now:
            continue
        if was is not None:
            due, due_at = _without_item(due, (was, name)), due_at.delete(name)
        if now is not None:
            due, due_at = _with_item(due, (now, name)), due_at.set(name, now)
    return replace(index, due=due, due_at=due_at)


def _dropped(mapping: Map[K, T], key: K) -> Map[K, T]:
    return mapping.delete(key) if key in mapping else mapping


def _changed(items: tuple[Item, ...], item: Item, *, present: bool) -> tuple[Item, ...]:
    return _with_item(items, item) if present else _without_item(items, item)


def _with_item(items: tuple[Item, ...], item: Item) -> tuple[Item, ...]:
    place = bisect_left(items, item)
    return (*items[:place], item, *items[place:])


def _without_item(items: tuple[Item, ...], item: Item) -> tuple[Item, ...]:
    place = bisect_left(items, item)
    if place < len(items) and items[place] == item:
        return items[:place] + items[place + 1 :]
    return items
