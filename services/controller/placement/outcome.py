"""What a decision changes in the view: events that planning folds before it is carried out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from services.controller.cluster_view.events import Event, MoveOrdered, Reserved, StopOrdered
from services.controller.cluster_view.view import Reservation, View
from services.controller.placement.place import Decision, Migrate, Placed, StopIdle
from stoker.ids import ModelName, NodeId, ReplicaId


def outcome(
    view: View,
    name: ModelName,
    decision: Decision,
    now_seconds: float,
    *,
    new_id: Callable[[], ReplicaId],
) -> Iterator[Event]:
    """Yield what a decision about a model changes; nothing where it must wait.

    Args:
        view: The cluster.
        name: Who was decided about.
        decision: What was decided.
        now_seconds: The view's clock.
        new_id: Names replicas that the shell has not named yet.
    """
    match decision:
        case Placed(node_id=node_id, devices=devices):
            yield Reserved(
                reservation=_tentative(view, name, node_id, devices, now_seconds, replica_id=new_id())
            )
        case StopIdle(victims=victims):
            for replica_id in victims:
                yield StopOrdered(replica_id=replica_id, now_seconds=now_seconds, for_model=name)
        case Migrate(moves=moves, victims=victims):
            for move in moves:
                target = _tentative(
                    view, move.model, move.to_node_id, move.to_devices, now_seconds, replica_id=new_id()
                )
                yield Reserved(reservation=target)
                yield MoveOrdered(replica_id=move.replica_id, to=target.replica_id, for_model=name)
            for replica_id in victims:
                yield StopOrdered(replica_id=replica_id, now_seconds=now_seconds, for_model=name)
        case _:
            pass


def _tentative(  # noqa: PLR0913 - a reservation's parts
    view: View,
    name: ModelName,
    node_id: NodeId,
    devices: tuple[int, ...],
    now_seconds: float,
    *,
    replica_id: ReplicaId,
) -> Reservation:
    return Reservation(
        replica_id=replica_id,
        model=name,
        node_id=node_id,
        devices=devices,
        runtime=view.models[name].runtime,
        seen_seconds=now_seconds,
    )
