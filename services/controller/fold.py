"""What happened, folded into the view: `fold(view, event) -> view`, pure.

The shell turns reports, commits, requests and its own orders into events; nothing else changes a view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from services.controller.view import (
    Demand,
    Failure,
    Model,
    Node,
    Phase,
    Refusal,
    Replica,
    Reservation,
    View,
)
from stoker.ids import ModelName, NodeId, ReplicaId

K = TypeVar("K")
V = TypeVar("V")

MEASURED_STARTS = 9
"""Starts remembered per model: a median of nine shrugs off four outliers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPut:
    """A model was deployed or changed."""

    model: Model


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDeleted:
    """A model was deleted."""

    name: ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """A reservation was decided, or read from the state."""

    reservation: Reservation


@dataclass(frozen=True, slots=True, kw_only=True)
class Releasing:
    """The deletion of a reservation was begun; its slots stay taken until `Released`."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """A reservation is gone."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReported:
    """An agent reported; `node` is whole."""

    node: Node


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDisconnected:
    """A report stream ended, or an order could not be delivered: suspect, its warm replicas still count."""

    node_id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeUnreachable:
    """A node was silent for too long."""

    node_id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeForgotten:
    """A node was silent for so long that it is no longer part of the cluster."""

    node_id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLost:
    """A reserved replica's node was waited for, and did not come."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class StopOrdered:
    """It was decided to stop a replica."""

    replica_id: ReplicaId
    now_seconds: float
    for_model: ModelName | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRefused:
    """The replica stays: it turned out to be busy, or its agent did not answer."""

    replica_id: ReplicaId
    busy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Demanded:
    """A request begins to wait for a model."""

    model: ModelName
    now_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandEnded:
    """A request waits no longer: served, refused or gone."""

    model: ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFailed:
    """A start failed for a reason that lies in the model or its order."""

    model: ModelName
    now_seconds: float
    retry_at_seconds: float
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A wanted replica could not be placed."""

    model: ModelName
    refusal: Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalLifted:
    """The replica was placed after all, or is no longer wanted."""

    model: ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class Distrusted:
    """A gateway found these replicas broken."""

    replica_ids: frozenset[ReplicaId]


Event = (
    ModelPut
    | ModelDeleted
    | Reserved
    | Releasing
    | Released
    | NodeReported
    | NodeDisconnected
    | NodeUnreachable
    | NodeForgotten
    | ReplicaLost
    | StopOrdered
    | StopRefused
    | Demanded
    | DemandEnded
    | StartFailed
    | Refused
    | RefusalLifted
    | Distrusted
)


def fold(view: View, event: Event) -> View:  # noqa: C901, PLR0911, PLR0912 - one line per event: a table
    """Return the view after `event`. Events about things that are gone change nothing."""
    match event:
        case ModelPut(model=model):
            return _model_put(view, model)
        case ModelDeleted(name=name):
            return _model_deleted(view, name)
        case Reserved(reservation=reservation):
            return replace(view, reservations=_with(view.reservations, reservation.replica_id, reservation))
        case Releasing(replica_id=replica_id):
            return _reservation(view, replica_id, releasing=True)
        case Released(replica_id=replica_id):
            return replace(view, reservations=_without(view.reservations, replica_id))
        case NodeReported(node=node):
            return _node_reported(view, node)
        case NodeDisconnected(node_id=node_id):
            return _node(view, node_id, connected=False)
        case NodeUnreachable(node_id=node_id):
            return _node(view, node_id, connected=False, reachable=False)
        case NodeForgotten(node_id=node_id):
            return replace(view, nodes=_without(view.nodes, node_id))
        case ReplicaLost(replica_id=replica_id):
            return _reservation(view, replica_id, lost=True)
        case StopOrdered():
            return _stop_ordered(view, event)
        case StopRefused(replica_id=replica_id, busy=busy):
            return _stop_refused(view, replica_id, busy=busy)
        case Demanded(model=model_name, now_seconds=now_seconds):
            return _demanded(view, model_name, now_seconds)
        case DemandEnded(model=model_name):
            return _demand_ended(view, model_name)
        case StartFailed():
            return _start_failed(view, event)
        case Refused(model=model_name, refusal=refusal):
            return replace(view, refusals=_with(view.refusals, model_name, refusal))
        case RefusalLifted(model=model_name):
            return replace(view, refusals=_without(view.refusals, model_name))
        case Distrusted(replica_ids=replica_ids):
            return replace(view, distrusted=view.distrusted | replica_ids)


def fold_all(view: View, events: list[Event]) -> View:
    """Return the view after all events, in order."""
    for event in events:
        view = fold(view, event)
    return view


def _model_put(view: View, model: Model) -> View:
    before = view.models.get(model.name)
    always = view.always | {model.name} if model.min_replicas else view.always - {model.name}
    view = replace(view, models=_with(view.models, model.name, model), always=always)
    view = replace(view, refusals=_without(view.refusals, model.name))
    if before is not None and before.runtime != model.runtime:
        view = replace(
            view,
            failures=_without(view.failures, model.name),
            measured=_without(view.measured, model.name),
        )
    return view


def _model_deleted(view: View, name: ModelName) -> View:
    return replace(
        view,
        models=_without(view.models, name),
        failures=_without(view.failures, name),
        refusals=_without(view.refusals, name),
        measured=_without(view.measured, name),
        always=view.always - {name},
    )


def _node_reported(view: View, node: Node) -> View:
    before = view.nodes.get(node.node_id)
    seen = before.replicas if before else {}
    replicas = {
        replica_id: _remembered(replica, seen.get(replica_id), node.last_seen_seconds)
        for replica_id, replica in node.replicas.items()
    }
    node = replace(node, replicas=replicas, connected=True, reachable=True)
    view = replace(
        view,
        nodes=_with(view.nodes, node.node_id, node),
        distrusted=view.distrusted - seen.keys() - replicas.keys(),
    )
    for reservation in view.reservations.values():
        if reservation.lost and reservation.node_id == node.node_id:
            view = _reservation(view, reservation.replica_id, lost=False)
    for replica in replicas.values():
        mine = view.reservations.get(replica.replica_id)
        if mine is not None and not mine.reported:
            view = _reservation(view, replica.replica_id, reported=True)
        was = seen.get(replica.replica_id)
        if replica.phase is Phase.READY and (was is None or was.phase is not Phase.READY):
            view = _started(view, replica)
    return view


def _remembered(replica: Replica, before: Replica | None, now_seconds: float) -> Replica:
    """Carry over since when this controller has known what the replica is."""
    ready_since_seconds = before.ready_since_seconds if before else None
    if ready_since_seconds is None and replica.phase is Phase.READY:
        ready_since_seconds = now_seconds
    first_seen_seconds = before.first_seen_seconds if before else now_seconds
    return replace(replica, first_seen_seconds=first_seen_seconds, ready_since_seconds=ready_since_seconds)


def _started(view: View, replica: Replica) -> View:
    if replica.model not in view.models:
        return view
    starts = (*view.measured.get(replica.model, ()), replica.stages)[-MEASURED_STARTS:]
    return replace(
        view,
        measured=_with(view.measured, replica.model, starts),
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
    for node in view.nodes.values():
        if replica_id in node.replicas:
            orphan = replace(node.replicas[replica_id], phase=Phase.STOPPING)
            node = replace(node, replicas=_with(node.replicas, replica_id, orphan))  # noqa: PLW2901 - new value
            return replace(view, nodes=_with(view.nodes, node.node_id, node))
    return view


def _stop_refused(view: View, replica_id: ReplicaId, *, busy: bool) -> View:
    """Keep the replica; one that is busy counts as such until its node's next report says how much."""
    view = _reservation(view, replica_id, stopping_since_seconds=None, stopping_for=None)
    reservation = view.reservations.get(replica_id)
    node = view.nodes.get(reservation.node_id) if reservation else None
    replica = node.replicas.get(replica_id) if node else None
    if not busy or node is None or replica is None:
        return view
    replica = replace(replica, sessions=max(1, replica.sessions), idle_since_seconds=None)
    node = replace(node, replicas=_with(node.replicas, replica_id, replica))
    return replace(view, nodes=_with(view.nodes, node.node_id, node))


def _demanded(view: View, name: ModelName, now_seconds: float) -> View:
    before = view.demands.get(name)
    demand = (
        replace(before, waiters=before.waiters + 1)
        if before
        else Demand(since_seconds=now_seconds, waiters=1)
    )
    return replace(view, demands=_with(view.demands, name, demand))


def _demand_ended(view: View, name: ModelName) -> View:
    before = view.demands.get(name)
    if before is None or before.waiters <= 1:
        return replace(view, demands=_without(view.demands, name))
    return replace(view, demands=_with(view.demands, name, replace(before, waiters=before.waiters - 1)))


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
    )
    return replace(view, failures=_with(view.failures, event.model, failure))


def _reservation(
    view: View,
    replica_id: ReplicaId,
    **changes: object,
) -> View:
    before = view.reservations.get(replica_id)
    if before is None:
        return view
    after = replace(before, **changes)  # type: ignore[arg-type]  # each caller names fields of Reservation
    return replace(view, reservations=_with(view.reservations, replica_id, after))


def _node(view: View, node_id: NodeId, **changes: bool) -> View:
    before = view.nodes.get(node_id)
    if before is None:
        return view
    after = replace(before, **changes)  # type: ignore[arg-type]  # each caller names flags of Node
    return replace(view, nodes=_with(view.nodes, node_id, after))


def _with(mapping: Mapping[K, V], key: K, value: V) -> Mapping[K, V]:
    return {**mapping, key: value}


def _without(mapping: Mapping[K, V], key: K) -> Mapping[K, V]:
    if key not in mapping:
        return mapping
    return {k: v for k, v in mapping.items() if k != key}
