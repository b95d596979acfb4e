"""What happened, folded into the view: `fold(view, event) -> view`, pure.

The shell turns reports, commits, requests and its own orders into events; nothing else changes a view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import TypeVar

from immutables import Map

from services.controller.cluster_view.demand import Failure, demanded
from services.controller.cluster_view.events import (
    Declined,
    Demanded,
    DemandEnded,
    Distrusted,
    Event,
    ForecastMissed,
    LoadReported,
    ModelDeleted,
    ModelPut,
    MoveGivenUp,
    MoveOrdered,
    NodeDisconnected,
    NodeForgotten,
    NodeReported,
    NodeUnreachable,
    RefusalLifted,
    Refused,
    Released,
    Releasing,
    ReplicaLost,
    Reserved,
    RoomSettled,
    SchedulingSet,
    StartFailed,
    StopOrdered,
    StopRefused,
)
from services.controller.cluster_view.forecast import arrived
from services.controller.cluster_view.frozen import changed, copier_of, finished
from services.controller.cluster_view.gain import load_makes_room, makes_room
from services.controller.cluster_view.holdings import held_changes
from services.controller.cluster_view.index import indexed, reindexed, reloaded
from services.controller.cluster_view.learnt import Moved
from services.controller.cluster_view.lessons import (
    fleet_after,
    fleet_with_start,
    is_complete,
    lessons_of,
    rates_after,
)
from services.controller.cluster_view.load_report import is_woken, narrowed, remembered, with_load
from services.controller.cluster_view.moves import learn_move
from services.controller.cluster_view.reach import reach_of, reach_of_report
from services.controller.cluster_view.view import (
    Model,
    Node,
    Phase,
    Replica,
    Scheduling,
    View,
)
from stoker.ids import ModelName, NodeId, ReplicaId

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

_draft_of = copier_of(View)
MEASURED_STARTS = 9
"""Starts remembered per model: a median of nine shrugs off four outliers."""


def fold(view: View, event: Event) -> View:
    """Return the view after `event`, its index current. Events about things that are gone change nothing."""
    before = view if view.index is not None else indexed(view)
    if isinstance(event, LoadReported):
        return _after_load(before, event)  # with its index, and what room it makes
    if isinstance(event, NodeReported):
        return _after_report(before, event)
    after = _after(before, event)
    if after is before:
        return before
    if isinstance(event, RoomSettled):
        return after  # of which the index says nothing
    reach = reach_of(before, event)
    after = reindexed(before, after, nodes=reach.nodes, models=reach.models, reservations=reach.replicas)
    return changed(after, room=after.room + 1) if makes_room(before, after, event, reach.nodes) else after


def _after_report(before: View, event: NodeReported) -> View:
    """Return the view after a whole report, its index current: what it says again costs a comparison."""
    node = event.node
    load = narrowed(before, node)
    if load is not None:
        return _after_load(before, load)
    was = before.nodes.get(node.node_id)
    held = held_changes(was.held, node.held) if was is not None else None
    after = _node_reported(before, node, is_held_as_before=held is not None and not held)
    reach = reach_of_report(before, after, node.node_id)
    after = reindexed(
        before, after, nodes=reach.nodes, models=reach.models, reservations=reach.replicas, held=held
    )
    is_room = makes_room(before, after, event, reach.nodes, held or ())
    return changed(after, room=after.room + 1) if is_room else after


def _after_load(before: View, event: LoadReported) -> View:
    """Return the view after a report of nothing but sessions, its index current: most events are such."""
    was = before.nodes.get(event.node_id)
    if was is None or not was.connected or not was.reachable:
        return before
    node, loads = with_load(was, event)
    draft = _draft_of(before)
    draft.nodes = _with(before.nodes, node.node_id, node)
    if before.distrusted:  # says nothing of a connected node's replicas: their summaries stay
        draft.distrusted = before.distrusted - node.replicas.keys()
    for was_replica, replica in loads:
        if is_woken(was_replica, replica) and replica.model in before.models:
            history = arrived(draft.arrivals.get(replica.model), event.seen_seconds)
            draft.arrivals = _with(draft.arrivals, replica.model, history)
    index, was_summary, summary = reloaded(before, draft, node.node_id, loads)
    draft.index = index
    if was_summary is not summary:
        draft.room += load_makes_room(was_summary, summary)
    return finished(draft, View)


def _after(view: View, event: Event) -> View:  # noqa: C901, PLR0911, PLR0912 - one line per event: a table
    match event:
        case ModelPut(model=model):
            return _model_put(view, model)
        case ModelDeleted(name=name):
            return _model_deleted(view, name)
        case Reserved(reservation=reservation):
            return changed(view, reservations=_with(view.reservations, reservation.replica_id, reservation))
        case Releasing(replica_id=replica_id):
            return _reservation(view, replica_id, releasing=True)
        case Released(replica_id=replica_id):
            return changed(view, reservations=_without(view.reservations, replica_id))
        case NodeReported():
            return _after_report(view, event)
        case LoadReported():
            return _after_load(view, event)
        case NodeDisconnected(node_id=node_id):
            return _node(view, node_id, connected=False)
        case NodeUnreachable(node_id=node_id):
            return _node(view, node_id, connected=False, reachable=False)
        case NodeForgotten(node_id=node_id):
            return changed(view, nodes=_without(view.nodes, node_id))
        case ReplicaLost(replica_id=replica_id):
            return _reservation(view, replica_id, lost=True)
        case StopOrdered():
            return _stop_ordered(view, event)
        case MoveOrdered(replica_id=replica_id, to=to, for_model=for_model):
            return _reservation(view, replica_id, moving_to=to, stopping_for=for_model)
        case MoveGivenUp(replica_id=replica_id):
            return _reservation(view, replica_id, moving_to=None, stopping_for=None)
        case SchedulingSet(node_id=node_id, scheduling=Scheduling.OPEN):
            return changed(view, scheduling=_without(view.scheduling, node_id))
        case SchedulingSet(node_id=node_id, scheduling=scheduling):
            return changed(view, scheduling=_with(view.scheduling, node_id, scheduling))
        case StopRefused(replica_id=replica_id, busy=busy):
            return _stop_refused(view, replica_id, busy=busy)
        case Demanded():
            return _demanded(view, event)
        case DemandEnded(model=model_name):
            return _demand_ended(view, model_name)
        case Declined(model=model_name, now_seconds=now_seconds):
            return _arrived(view, model_name, now_seconds)
        case StartFailed():
            return _start_failed(view, event)
        case Refused(model=model_name, refusal=refusal):
            return changed(view, refusals=_with(view.refusals, model_name, refusal))
        case ForecastMissed(model=model_name):
            return _missed(view, model_name)
        case RefusalLifted(model=model_name):
            return changed(view, refusals=_without(view.refusals, model_name))
        case RoomSettled(room=room):
            return changed(view, room_settled=room)
        case Distrusted(replica_ids=replica_ids):
            return changed(view, distrusted=view.distrusted | replica_ids)


def fold_all(view: View, events: list[Event]) -> View:
    """Return the view after all events, in order."""
    for event in events:
        view = fold(view, event)
    return view


def _model_put(view: View, model: Model) -> View:
    before = view.models.get(model.name)
    always = view.always | {model.name} if model.min_replicas else view.always - {model.name}
    view = changed(view, models=_with(view.models, model.name, model), always=always)
    view = changed(view, refusals=_without(view.refusals, model.name))
    if before is not None and before.runtime != model.runtime:
        view = changed(
            view,
            failures=_without(view.failures, model.name),
            measured=_without(view.measured, model.name),
        )
    return view


def _model_deleted(view: View, name: ModelName) -> View:
    return changed(
        view,
        models=_without(view.models, name),
        failures=_without(view.failures, name),
        refusals=_without(view.refusals, name),
        measured=_without(view.measured, name),
        arrivals=_without(view.arrivals, name),
        always=view.always - {name},
    )


def _node_reported(view: View, node: Node, *, is_held_as_before: bool) -> View:
    """Return the view with a report; what of the node is as before stays the very same object."""
    before = view.nodes.get(node.node_id)
    seen = before.replicas if before else {}
    replicas = {
        replica_id: remembered(replica, seen.get(replica_id), node.last_seen_seconds)
        for replica_id, replica in node.replicas.items()
    }
    lessons = lessons_of(before, replicas)
    fleet = fleet_after(view.fleet, lessons, node)
    learnt = rates_after(node, before, lessons, fleet)
    opening = {tier: median(seconds) for tier, seconds in fleet.openings.items()}
    node = changed(
        node,
        replicas=replicas,
        held=before.held if before and is_held_as_before else node.held,
        stages=_as_before(before.stages, node.stages) if before else node.stages,
        pool=_as_before(before.pool, node.pool) if before else node.pool,
        learnt=_as_before(before.learnt, learnt) if before else learnt,
        opening=_as_before(before.opening, opening) if before else opening,
        connected=True,
        reachable=True,
    )
    view = changed(
        view,
        nodes=_with(view.nodes, node.node_id, node),
        fleet=fleet,
        distrusted=view.distrusted - seen.keys() - replicas.keys() if view.distrusted else view.distrusted,
    )
    for replica_id in view.index.on_node.get(node.node_id, ()) if view.index else ():
        if view.reservations[replica_id].lost:
            view = _reservation(view, replica_id, lost=False)
    for moved in _new_moves(node, before):
        key = (moved.model, moved.path)
        view = changed(view, moves=_with(view.moves, key, learn_move(view.moves.get(key), moved)))
    for replica in replicas.values():
        mine = view.reservations.get(replica.replica_id)
        if mine is not None and not mine.reported:
            view = _reservation(view, replica.replica_id, reported=True)
        was = seen.get(replica.replica_id)
        if was is replica:
            continue
        if is_complete(replica) and (was is None or not is_complete(was)):
            view = _started(view, replica)
        if replica.sessions and was is not None and was.phase is Phase.READY and not was.sessions:
            view = _arrived(view, replica.model, node.last_seen_seconds)
    return view


def _as_before(before: T, now: T) -> T:
    """Return the object of before where it is equal: what follows from it need not be found out again."""
    return before if before == now else now


def _new_moves(node: Node, before: Node | None) -> list[Moved]:
    known = {moved.migration_id for moved in before.moved} if before else set()
    return [moved for moved in node.moved if moved.migration_id not in known]


def _arrived(view: View, name: ModelName, now_seconds: float) -> View:
    if name not in view.models:
        return view
    return changed(view, arrivals=_with(view.arrivals, name, arrived(view.arrivals.get(name), now_seconds)))


def _started(view: View, replica: Replica) -> View:
    if replica.model not in view.models:
        return view
    starts = (*view.measured.get(replica.model, ()), replica.stages)[-MEASURED_STARTS:]
    return changed(
        view,
        measured=_with(view.measured, replica.model, starts),
        fleet=fleet_with_start(view.fleet, view.models[replica.model], replica.stages),
        failures=_without(view.failures, replica.model),
    )


def _stop_ordered(view: View, event: StopOrdered) -> View:
    """Mark the reservation; an orphan has none, so its replica counts as stopping until reported anew."""
    replica_id = event.replica_id
    if replica_id in view.reservations:
        return _reservation(
            view,
            replica_id,
            stopping_since_seconds=event.now_seconds,
            stopping_for=event.for_model,
        )
    node = view.nodes.get(event.node_id) if event.node_id is not None else None
    if node is None or replica_id not in node.replicas:
        return view
    orphan = replace(node.replicas[replica_id], phase=Phase.STOPPING)
    node = replace(node, replicas={**node.replicas, replica_id: orphan})
    return changed(view, nodes=_with(view.nodes, node.node_id, node))


def _stop_refused(view: View, replica_id: ReplicaId, *, busy: bool) -> View:
    """Keep the replica; one that is busy counts as such until its node's next report says how much."""
    view = _reservation(view, replica_id, stopping_since_seconds=None, stopping_for=None)
    reservation = view.reservations.get(replica_id)
    node = view.nodes.get(reservation.node_id) if reservation else None
    replica = node.replicas.get(replica_id) if node else None
    if not busy or node is None or replica is None:
        return view
    replica = replace(replica, sessions=max(1, replica.sessions), idle_since_seconds=None)
    node = replace(node, replicas={**node.replicas, replica_id: replica})
    return changed(view, nodes=_with(view.nodes, node.node_id, node))


def _demanded(view: View, event: Demanded) -> View:
    name, before = event.model, view.demands.get(event.model)
    demand = demanded(before, event.waited_seconds, event.earlier_waits_seconds, event.now_seconds)
    view = changed(view, demands=_with(view.demands, name, demand))
    if before is None:
        return _arrived(view, name, event.now_seconds)
    refusal = view.refusals.get(name)
    if refusal is None or refusal.retry_at_seconds is None or demand.since_seconds == before.since_seconds:
        return view
    retry_at_seconds = min(refusal.retry_at_seconds, event.now_seconds)  # a bound may be reached already
    return changed(
        view, refusals=_with(view.refusals, name, changed(refusal, retry_at_seconds=retry_at_seconds))
    )


def _missed(view: View, name: ModelName) -> View:
    before = view.arrivals.get(name)
    if before is None:
        return view
    return changed(view, arrivals=_with(view.arrivals, name, replace(before, missed=True)))


def _demand_ended(view: View, name: ModelName) -> View:
    before = view.demands.get(name)
    if before is None or before.waiters <= 1:
        return changed(view, demands=_without(view.demands, name))
    return changed(view, demands=_with(view.demands, name, changed(before, waiters=before.waiters - 1)))


def _start_failed(view: View, event: StartFailed) -> View:
    if event.model not in view.models:
        return view
    before = view.failures.get(event.model)
    failure = Failure(
        count=(before.count if before else 0) + 1,
        at_seconds=event.now_seconds,
        retry_at_seconds=event.retry_at_seconds,
        code=event.code,
        message=event.message,
        is_final=event.is_final,
    )
    return changed(view, failures=_with(view.failures, event.model, failure))


def _reservation(
    view: View,
    replica_id: ReplicaId,
    **changes: object,
) -> View:
    before = view.reservations.get(replica_id)
    if before is None:
        return view
    after = changed(before, **changes)
    return changed(view, reservations=_with(view.reservations, replica_id, after))


def _node(view: View, node_id: NodeId, **changes: bool) -> View:
    before = view.nodes.get(node_id)
    if before is None:
        return view
    after = changed(before, **changes)
    return changed(view, nodes=_with(view.nodes, node_id, after))


def _with(mapping: Mapping[K, V], key: K, value: V) -> Mapping[K, V]:
    return (mapping if isinstance(mapping, Map) else _shared(mapping)).set(key, value)


def _without(mapping: Mapping[K, V], key: K) -> Mapping[K, V]:
    return _shared(mapping).delete(key) if key in mapping else mapping


def _shared(mapping: Mapping[K, V]) -> Map[K, V]:
    """Return the mapping as one whose changed copies share all that did not change."""
    return mapping if isinstance(mapping, Map) else Map(mapping)
