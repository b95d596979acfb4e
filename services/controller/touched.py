"""Which models an event may have changed for those who watch: `touched(view, event)`, pure."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from services.controller.events import (
    Declined,
    Demanded,
    DemandEnded,
    Distrusted,
    Event,
    ForecastMissed,
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
from services.controller.index import index_of, reservations_on
from services.controller.view import Node, View
from stoker.ids import ModelName, NodeId


def touched(before: View, event: Event) -> AbstractSet[ModelName]:  # noqa: C901, PLR0911 - one line per event: a table
    """Return the models whose state, replicas or stores `event` may change, given the view before it."""
    match event:
        case ModelPut(model=model):
            return {model.name}
        case ModelDeleted(name=name):
            return {name}
        case Reserved(reservation=reservation):
            return {reservation.model}
        case (
            Releasing(replica_id=replica_id)
            | Released(replica_id=replica_id)
            | ReplicaLost(replica_id=replica_id)
            | StopOrdered(replica_id=replica_id)
            | StopRefused(replica_id=replica_id)
            | MoveOrdered(replica_id=replica_id)
            | MoveGivenUp(replica_id=replica_id)
        ):
            found = before.reservations.get(replica_id)
            return {found.model} if found else set()
        case NodeReported(node=node):
            return _touched_by_report(before, node)
        case NodeDisconnected(node_id=node_id):
            return _models_on(before, node_id)
        case NodeUnreachable() | NodeForgotten():
            return set(before.models)
        case (
            StartFailed(model=name)
            | Refused(model=name)
            | RefusalLifted(model=name)
            | ForecastMissed(model=name)
        ):
            return {name}
        case Distrusted(replica_ids=replica_ids):
            return {before.reservations[found].model for found in replica_ids if found in before.reservations}
        case Demanded() | DemandEnded() | Declined() | SchedulingSet() | RoomSettled():
            return set()


def _touched_by_report(before: View, node: Node) -> AbstractSet[ModelName]:
    was = before.nodes.get(node.node_id)
    if was is None or not was.reachable or was.store_address != node.store_address:
        return set(before.models)  # a store came or moved: every model may use it
    return {replica.model for replica in (*was.replicas.values(), *node.replicas.values())}


def _models_on(view: View, node_id: NodeId) -> set[ModelName]:
    index = index_of(view)
    return {found.model for found in reservations_on(view, index, node_id)}
