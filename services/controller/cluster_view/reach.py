"""What an event may change: one table for the index that `fold` keeps and for who watches models. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter

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
from services.controller.cluster_view.frozen import maker_of
from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.view import Model, Node, Replica, View
from stoker.ids import ModelName, NodeId, ReplicaId


class Watched(Enum):
    """Of which models those who watch are told."""

    THESE = "these"
    """Of those that the event reaches."""
    ALL = "all"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What an event may change.

    Attributes:
        replicas: Reserved ones that may come, go, or stand otherwise.
        models: Those whose definition, demand, failures or replicas may change.
        nodes: Those whose report, replicas or reservations may change.
        watched: Whose state, replicas or stores may be other than those who watch were told.
    """

    replicas: frozenset[ReplicaId] = frozenset()
    models: frozenset[ModelName] = frozenset()
    nodes: frozenset[NodeId] = frozenset()
    watched: Watched = Watched.THESE


_make_reach = maker_of(Reach)
NOWHERE = Reach(watched=Watched.NONE)


def reach_of(before: View, event: Event) -> Reach:  # noqa: C901, PLR0911, PLR0912 - a table of the events
    """Return what `event` may change, given the view before it."""
    match event:
        case Reserved(reservation=reservation):
            return _make_reach(
                replicas=frozenset({reservation.replica_id}),
                models=frozenset({reservation.model}),
                nodes=frozenset({reservation.node_id}),
            )
        case StopOrdered(replica_id=replica_id, node_id=node_id):
            return _of_replicas(before, (replica_id,), nodes=() if node_id is None else (node_id,))
        case (
            Releasing(replica_id=replica_id)
            | Released(replica_id=replica_id)
            | ReplicaLost(replica_id=replica_id)
            | StopRefused(replica_id=replica_id)
            | MoveOrdered(replica_id=replica_id)
            | MoveGivenUp(replica_id=replica_id)
        ):
            return _of_replicas(before, (replica_id,))
        case Distrusted(replica_ids=replica_ids):
            return _of_replicas(before, replica_ids)
        case NodeReported(node=node):
            return _of_report(before, node)
        case LoadReported(node_id=node_id, replicas=replicas):
            return _of_replicas(
                before,
                [each.replica_id for each in replicas],
                models=[each.model for each in replicas],
                nodes=(node_id,),
            )
        case NodeDisconnected(node_id=node_id):
            return _of_node(before, node_id)
        case NodeUnreachable(node_id=node_id) | NodeForgotten(node_id=node_id):
            return _of_node(before, node_id, watched=Watched.ALL)
        case SchedulingSet(node_id=node_id):
            return _of_node(before, node_id, watched=Watched.NONE)
        case ModelPut(model=Model(name=name)) | ModelDeleted(name=name):
            return _of_replicas(before, index_of(before).of_model.get(name, ()), models=(name,))
        case (
            StartFailed(model=name)
            | Refused(model=name)
            | RefusalLifted(model=name)
            | ForecastMissed(model=name)
        ):
            return _make_reach(models=frozenset({name}))
        case Demanded(model=name) | DemandEnded(model=name) | Declined(model=name):
            return _make_reach(models=frozenset({name}), watched=Watched.NONE)
        case RoomSettled():
            return NOWHERE


def reach_of_report(before: View, after: View, node_id: NodeId) -> Reach:
    """Return what a whole report has changed, now that it is folded: of most replicas nothing.

    Args:
        before: With its index.
        after: The view with the report, its index not current yet.
        node_id: Who reported.
    """
    was, now = before.nodes.get(node_id), after.nodes[node_id]
    if was is None or not (was.connected and was.reachable) or was.draining != now.draining:
        return _of_report(before, now)
    others = [
        each
        for each in was.replicas.keys() | now.replicas.keys()
        if _stands_otherwise(was.replicas.get(each), now.replicas.get(each))
    ]
    reserved = [
        each
        for each in index_of(before).on_node.get(node_id, ())
        if before.reservations[each] is not after.reservations[each]
    ]
    return _of_replicas(
        before,
        [*others, *reserved],
        models=[each.model for found in (was, now) for of in others if (each := found.replicas.get(of))],
        nodes=(node_id,),
    )


def _stands_otherwise(was: Replica | None, now: Replica | None) -> bool:
    """Tell whether anything of a replica is other that `attention` reads; contexts that grow are not."""
    if was is now:
        return False
    return was is None or now is None or _read_of_replica(was) != _read_of_replica(now)


_read_of_replica = attrgetter("model", "phase", "sessions", "waiting_since_seconds", "idle_since_seconds")


def touched(before: View, event: Event) -> AbstractSet[ModelName]:
    """Return the models of which those who watch are to be told, given the view before the event."""
    reach = reach_of(before, event)
    if reach.watched is Watched.ALL:
        return set(before.models)
    return reach.models if reach.watched is Watched.THESE else frozenset()


def _of_replicas(
    before: View,
    replicas: Iterable[ReplicaId],
    *,
    models: Iterable[ModelName] = (),
    nodes: Iterable[NodeId] = (),
    watched: Watched = Watched.THESE,
) -> Reach:
    """Return the reach of an event about reserved replicas: their models and nodes, and those named."""
    replicas = frozenset(replicas)
    found = [before.reservations[each] for each in replicas if each in before.reservations]
    return _make_reach(
        replicas=replicas,
        models=frozenset([*(each.model for each in found), *models]),
        nodes=frozenset([*(each.node_id for each in found), *nodes]),
        watched=watched,
    )


def _of_node(before: View, node_id: NodeId, *, watched: Watched = Watched.THESE) -> Reach:
    replicas = index_of(before).on_node.get(node_id, ())
    return _of_replicas(
        before, replicas, nodes=(node_id,) if node_id in before.nodes else (), watched=watched
    )


def _of_report(before: View, node: Node) -> Reach:
    was = before.nodes.get(node.node_id)
    is_new = was is None or not was.reachable or was.store_address != node.store_address
    return _of_replicas(
        before,
        index_of(before).on_node.get(node.node_id, ()),
        models=[each.model for found in (was, node) if found for each in found.replicas.values()],
        nodes=(node.node_id,),
        watched=Watched.ALL if is_new else Watched.THESE,  # a store came or moved: every model may use it
    )
