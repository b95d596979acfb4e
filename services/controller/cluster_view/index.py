"""Summaries that keep decisions fast: made from a view, and kept current by `fold`. Pure.

A decision over thousands of nodes looks at few of them, because nodes are kept sorted by what makes a start
fast. Rules:

1. An index says nothing that the view does not: `index_of(view)` makes the same one anew (property-tested).
2. Everything in it is immutable; a change shares all but what it touches with the index before.
3. It knows no policy and no time, so that neither makes it stale.
4. A change costs what it changes: of a node's places in the lists only those that differ are moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from math import floor
from typing import TypeVar

from immutables import Map

from services.controller.cluster_view.attention import (
    EMPTY,
    Mark,
    Tally,
    due_of,
    mark_of,
)
from services.controller.cluster_view.fleet import member
from services.controller.cluster_view.frozen import changed, copier_of, finished
from services.controller.cluster_view.groups import Groups, Members
from services.controller.cluster_view.holdings import Change, held_changes
from services.controller.cluster_view.ladder import Ladder, item_added, item_removed
from services.controller.cluster_view.load_report import Load
from services.controller.cluster_view.places import (
    Draft,
    Nodes,
    Rung,
    disturbing_places,
    has_free_slots,
    move,
    move_disturbed,
    move_free,
    placed_by,
    places,
    put,
)
from services.controller.cluster_view.summary import (
    Shape,
    Summary,
    summary_of,
    summary_with_load,
)
from services.controller.cluster_view.view import Checkpoint, Held, Node, Phase, Reservation, View
from stoker.ids import ModelName, NodeId, ReplicaId

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Summaries of a view.

    Attributes:
        on_node: Reservations of each node, sorted.
        of_model: Reservations of each model, sorted.
        summaries: Of every node.
        holders: Nodes whose stores hold some of a checkpoint.
        in_memory: Those of them that have some of it in memory.
        free: Open nodes with free slots, the fastest first; by negative rate.
        free_by_worker: Those where no worker waits, by the time that one takes; their origin is "".
        free_nodes: All of those with free slots, in no order.
        tallies: Of every model with replicas.
        idle_by_rate: Open nodes with an idle replica, the fastest first, by origin.
        idle_by_worth: The same, by what the replica cheapest to lose is worth; see `traits`.
        busy_by_rate: Open nodes with a replica that serves sessions, the fastest first, by origin.
        by_opening: Open nodes by the seconds before the first byte comes, the fewest first, by origin.
        by_device: Open nodes by the rate to their devices, the slowest first.
        leaving: Nodes with replicas on their way out, by whom these make room for.
        orphaned: Nodes with replicas that nobody reserved.
        homeless: Nodes that have reservations, and are not in the cluster.
        labelled: Nodes by label.
        open_nodes: Ids, sorted.
        last_seen: Every node by the time of its last report, in whole seconds: no later than that was.
        due: When something about a model may have to be done next, by time and name.
        due_at: The same, by name.
        shapes: How many nodes there are of each shape.
    """

    on_node: Map[NodeId, tuple[ReplicaId, ...]] = field(default_factory=Map)
    of_model: Map[ModelName, tuple[ReplicaId, ...]] = field(default_factory=Map)
    summaries: Map[NodeId, Summary] = field(default_factory=Map)
    holders: Groups[Checkpoint] = field(default_factory=Groups)
    in_memory: Groups[Checkpoint] = field(default_factory=Groups)
    free: Map[Rung, Nodes] = field(default_factory=Map)
    free_by_worker: Map[Rung, Nodes] = field(default_factory=Map)
    free_nodes: Members = field(default_factory=Map)
    tallies: Map[ModelName, Tally] = field(default_factory=Map)
    idle_by_rate: Map[str, Nodes] = field(default_factory=Map)
    idle_by_worth: Nodes = field(default_factory=Ladder)
    busy_by_rate: Map[str, Nodes] = field(default_factory=Map)
    by_opening: Map[str, Nodes] = field(default_factory=Map)
    by_device: Nodes = field(default_factory=Ladder)
    leaving: Map[ModelName, Members] = field(default_factory=Map)
    orphaned: Members = field(default_factory=Map)
    homeless: Members = field(default_factory=Map)
    labelled: Map[tuple[str, str], Members] = field(default_factory=Map)
    open_nodes: Ladder[NodeId] = field(default_factory=Ladder)
    last_seen: Nodes = field(default_factory=Ladder)
    due: Ladder[tuple[float, ModelName]] = field(default_factory=Ladder)
    due_at: Map[ModelName, float] = field(default_factory=Map)
    shapes: Map[Shape, int] = field(default_factory=Map)


_draft_of = copier_of(Index)


def index_of(view: View) -> Index:
    """Return the view's index, made anew when it has none."""
    index = view.index
    if index is not None:
        return index
    on_node: dict[NodeId, list[ReplicaId]] = {}
    of_model: dict[ModelName, list[ReplicaId]] = {}
    for replica_id in sorted(view.reservations):
        reservation = view.reservations[replica_id]
        on_node.setdefault(reservation.node_id, []).append(replica_id)
        of_model.setdefault(reservation.model, []).append(replica_id)
    draft = _draft_of(Index())
    draft.on_node = Map({key: tuple(found) for key, found in on_node.items()})
    draft.of_model = Map({key: tuple(found) for key, found in of_model.items()})
    for replica_id in sorted(view.reservations):
        _retally(draft, None, view, replica_id, view.reservations[replica_id].model)
    for node_id in sorted(view.nodes):
        _change_node(draft, None, view, node_id)
    for node_id in sorted(on_node):
        _rehome(draft, view, node_id)
    _change_models(draft, view, {*view.models, *of_model, *view.demands})
    return finished(draft, Index)


def indexed(view: View) -> View:
    """Return the view with its index."""
    return view if view.index is not None else changed(view, index=index_of(view))


def reindexed(  # noqa: PLR0913 - what an event may have changed, each named by its caller
    before: View,
    after: View,
    *,
    nodes: AbstractSet[NodeId],
    models: AbstractSet[ModelName],
    reservations: AbstractSet[ReplicaId],
    held: Sequence[Change] | None = None,
) -> View:
    """Return `after` with the index of `before` brought up to date.

    Args:
        before: With its index.
        after: What an event made of it.
        nodes: Those that may have changed, or whose replicas or reservations may have.
        models: Those whose definition, demand, failures or replicas may have changed.
        reservations: Those that may have come or gone.
        held: What the store of the one node that reported holds otherwise; None = it is found out here.
    """
    draft = _draft_of(index_of(before))
    for replica_id in reservations:
        _change_reservation(draft, before, after, replica_id)
    for node_id in nodes:
        _change_node(draft, before, after, node_id, held)
    _change_models(draft, after, models)
    return changed(after, index=finished(draft, Index))


def reloaded(
    before: View, after: View, node_id: NodeId, loads: Iterable[Load]
) -> tuple[Index, Summary, Summary]:
    """Return the index of `before` after nothing has changed but sessions on a node and what waits there.

    And the node's summary, before and after.

    Args:
        before: With its index.
        after: The same with the node's replicas as they are now.
        node_id: Which node.
        loads: Its replicas that have other sessions, more than longer contexts.
    """
    draft = _draft_of(index_of(before))
    names: dict[ModelName, None] = {}
    loaded: list[Reservation] = []
    for was_replica, replica in loads:
        reservation = after.reservations.get(replica.replica_id)
        if reservation is not None and reservation.node_id == node_id:
            loaded.append(reservation)
            is_ready = replica.phase is Phase.READY and not (
                reservation.releasing or reservation.stopping_since_seconds is not None
            )
            tally: Tally = draft.tallies[reservation.model]
            tally = tally.after_load(was_replica, replica, is_ready=is_ready)
            draft.tallies = draft.tallies.set(reservation.model, tally)
        names[replica.model] = None
    was, node, was_summary = before.nodes[node_id], after.nodes[node_id], draft.summaries[node_id]
    _resee(draft, was, node)
    if was.stages is node.stages:
        now_summary = summary_with_load(after, node, was_summary, loaded)
    else:  # what waits there is part of what idle replicas are worth
        reservations = tuple([after.reservations[found] for found in draft.on_node.get(node_id, ())])
        now_summary = summary_of(after, node_id, reservations, was_summary, was)
    if now_summary is not was_summary:
        draft.summaries = draft.summaries.set(node_id, now_summary)
        if was_summary.is_open:
            move_disturbed(draft, was_summary, now_summary, node_id)
    _change_models(draft, after, names)
    return finished(draft, Index), was_summary, now_summary


def reservations_on(view: View, index: Index, node_id: NodeId) -> tuple[Reservation, ...]:
    """Return a node's reservations, by replica id."""
    return tuple(view.reservations[replica_id] for replica_id in index.on_node.get(node_id, ()))


def reservations_of(view: View, index: Index, name: ModelName) -> tuple[Reservation, ...]:
    """Return a model's reservations, by replica id."""
    return tuple(view.reservations[replica_id] for replica_id in index.of_model.get(name, ()))


def _change_reservation(draft: Draft, before: View, after: View, replica_id: ReplicaId) -> None:
    was, now = before.reservations.get(replica_id), after.reservations.get(replica_id)
    found = was or now
    if found is None:
        return
    _retally(draft, before, after, replica_id, found.model)
    if (was is None) == (now is None):
        return  # neither its node nor its model ever changes
    draft.on_node = _listed(draft.on_node, found.node_id, replica_id, present=now is not None)
    draft.of_model = _listed(draft.of_model, found.model, replica_id, present=now is not None)
    _rehome(draft, after, found.node_id)


def _retally(draft: Draft, before: View | None, after: View, replica_id: ReplicaId, name: ModelName) -> None:
    """Bring the tally of a replica's model up to date with what the replica adds to it."""
    was, now = _mark(before, replica_id) if before is not None else None, _mark(after, replica_id)
    if was == now:
        return
    tally: Tally = draft.tallies.get(name, EMPTY).after(was, now)
    draft.tallies = put(draft.tallies, name, tally if tally.replicas else None)


def _mark(view: View, replica_id: ReplicaId) -> Mark | None:
    reservation = view.reservations.get(replica_id)
    return mark_of(view, member(view, reservation)) if reservation is not None else None


def _rehome(draft: Draft, view: View, node_id: NodeId) -> None:
    is_homeless = node_id in draft.on_node and node_id not in view.nodes
    draft.homeless = _marked(draft.homeless, node_id, present=is_homeless)


def _change_node(
    draft: Draft, before: View | None, after: View, node_id: NodeId, held: Sequence[Change] | None = None
) -> None:
    was, now = before.nodes.get(node_id) if before else None, after.nodes.get(node_id)
    was_summary: Summary | None = draft.summaries.get(node_id)
    if was is not now:
        if was is None or now is None:
            _rehome(draft, after, node_id)
        _resee(draft, was, now)
        _rehold(draft, was.held if was else {}, now.held if now else {}, node_id, held)
        if was is None or now is None or was.labels != now.labels:
            draft.labelled = _regrouped(
                draft.labelled, was.labels if was else (), now.labels if now else (), node_id
            )
    now_summary = None
    if now is not None:
        is_comparable = (
            before is not None
            and was is not None
            and before.models is after.models
            and before.distrusted is after.distrusted
        )
        reservations = tuple([after.reservations[found] for found in draft.on_node.get(node_id, ())])
        now_summary = summary_of(after, node_id, reservations, was_summary if is_comparable else None, was)
    draft.summaries = put(draft.summaries, node_id, now_summary)  # equal ones may have other traits
    if was_summary == now_summary:
        return
    _recount(draft, was_summary, now_summary)
    if was_summary is None or now_summary is None or placed_by(was_summary) != placed_by(now_summary):
        move(draft, places(was_summary, node_id), places(now_summary, node_id))
        move(draft, disturbing_places(was_summary, node_id), disturbing_places(now_summary, node_id))
    elif now_summary.is_open:
        move_free(draft, was_summary, now_summary, node_id)
        move_disturbed(draft, was_summary, now_summary, node_id)
    draft.free_nodes = _marked(draft.free_nodes, node_id, present=has_free_slots(now_summary))
    was_leaving = was_summary.leaving_for if was_summary else ()
    now_leaving = now_summary.leaving_for if now_summary else ()
    if was_leaving != now_leaving:
        draft.leaving = _regrouped(draft.leaving, was_leaving, now_leaving, node_id)
    draft.orphaned = _marked(
        draft.orphaned, node_id, present=now_summary is not None and now_summary.has_orphans
    )


def _resee(draft: Draft, was: Node | None, now: Node | None) -> None:
    before = floor(was.last_seen_seconds) if was is not None else None
    after = floor(now.last_seen_seconds) if now is not None else None
    if before == after:
        return
    if was is not None and before is not None and now is not None and after is not None:
        draft.last_seen = draft.last_seen.moved((before, was.node_id), (after, now.node_id))
    elif was is not None and before is not None:
        draft.last_seen = draft.last_seen.removed((before, was.node_id))
    elif now is not None and after is not None:
        draft.last_seen = draft.last_seen.added((after, now.node_id))


def _rehold(
    draft: Draft,
    was: Mapping[Checkpoint, Held],
    now: Mapping[Checkpoint, Held],
    node_id: NodeId,
    changes: Sequence[Change] | None,
) -> None:
    """Note which checkpoints a node holds, and which in memory, by what is other than before."""
    if was is now:
        return
    if not was:  # a node's first report: a cluster's are millions of checkpoints
        draft.holders = draft.holders.moved(node_id, (), now)
        draft.in_memory = draft.in_memory.moved(
            node_id, (), [each for each, held in now.items() if held.dram_bytes > 0]
        )
        return
    if changes is None:
        changes = held_changes(was, now)
    if not changes:
        return
    draft.holders = draft.holders.moved(
        node_id,
        [each for each, before, after in changes if before is not None and after is None],
        [each for each, before, after in changes if before is None and after is not None],
    )
    draft.in_memory = draft.in_memory.moved(
        node_id,
        [each for each, before, after in changes if _has_some(before) and not _has_some(after)],
        [each for each, before, after in changes if _has_some(after) and not _has_some(before)],
    )


def _has_some(held: Held | None) -> bool:
    """Tell whether some of a checkpoint is in memory."""
    return held is not None and held.dram_bytes > 0


def _recount(draft: Draft, was: Summary | None, now: Summary | None) -> None:
    if was is not None and now is not None and was.shape == now.shape:
        return
    for summary, change in ((now, 1), (was, -1)):
        if summary is not None:
            count = draft.shapes.get(summary.shape, 0) + change
            draft.shapes = put(draft.shapes, summary.shape, count or None)


def _change_models(draft: Draft, view: View, names: Iterable[ModelName]) -> None:
    for name in names:
        was = draft.due_at.get(name)
        now = due_of(view, name, draft.tallies.get(name, EMPTY))
        if was == now:
            continue
        if was is not None and now is not None:
            draft.due = draft.due.moved((was, name), (now, name))
        elif was is not None:
            draft.due = draft.due.removed((was, name))
        elif now is not None:
            draft.due = draft.due.added((now, name))
        draft.due_at = put(draft.due_at, name, now)


def _listed(
    lists: Map[K, tuple[ReplicaId, ...]], key: K, item: ReplicaId, *, present: bool
) -> Map[K, tuple[ReplicaId, ...]]:
    items = lists.get(key, ())
    items = item_added(items, item) if present else item_removed(items, item)
    return put(lists, key, items or None)


def _regrouped(
    groups: Map[K, Members], had: Iterable[K], has: Iterable[K], node_id: NodeId
) -> Map[K, Members]:
    """Return the groups with a node taken out of those it was in and put into those it is in."""
    had, has = set(had), set(has)
    draft = groups.mutate()
    for key in has - had:
        draft[key] = draft.get(key, Map()).set(node_id, None)
    for key in had - has:
        left = draft[key].delete(node_id)
        if left:
            draft[key] = left
        else:
            del draft[key]
    return draft.finish()


def _marked(members: Members, node_id: NodeId, *, present: bool) -> Members:
    if present == (node_id in members):
        return members
    return members.set(node_id, None) if present else members.delete(node_id)
