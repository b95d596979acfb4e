"""What can happen to the cluster, as values: the input of `fold`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from services.controller.cluster_view.demand import Refusal
from services.controller.cluster_view.view import Model, Node, Replica, Reservation, Scheduling
from stoker.ids import ModelName, NodeId, ReplicaId


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


class SessionLoad(NamedTuple):
    """The sessions of one replica, as `Replica` has them; a tuple, because most reports say no more."""

    replica_id: ReplicaId
    model: ModelName
    sessions: int = 0
    waiting_sessions: int = 0
    waiting_since_seconds: float | None = None
    idle_since_seconds: float | None = None
    context_tokens: int = 0
    longest_since_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReported:
    """An agent reported, and nothing is other than before but sessions, and bytes that wait before stages.

    Of a node that is not connected it says nothing: that reports whole first.
    """

    node_id: NodeId
    replicas: tuple[Replica | SessionLoad, ...]
    """Those whose sessions changed; of a whole one nothing else is read."""
    seen_seconds: float
    queued_bytes: Mapping[str, int] | None = None
    """Before stages where they are others, by the stage's name; None = nowhere."""


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
    node_id: NodeId | None = None
    """Where it runs; needed when nobody reserved it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveOrdered:
    """It was decided to move a replica: `to` was reserved for it, its sessions follow once that is ready."""

    replica_id: ReplicaId
    to: ReplicaId
    for_model: ModelName | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveGivenUp:
    """The replica stays: what it was to move to will not come."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastMissed:
    """A model was not asked for when its history said so; the forecast rests until it is."""

    model: ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingSet:
    """An operator opened, cordoned or drained a node."""

    node_id: NodeId
    scheduling: Scheduling


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
    waited_seconds: float = 0.0
    """It has in all: also in a replica's queue, or with the leader before."""
    earlier_waits_seconds: float = 0.0
    """Of these, before it was served last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandEnded:
    """A request waits no longer: served, refused or gone."""

    model: ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class Declined:
    """A request was refused at once because no start could meet its deadline; forecasts count it."""

    model: ModelName
    now_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFailed:
    """A start failed, not for its node's silence; `is_final`: no other one is tried for those who wait."""

    model: ModelName
    now_seconds: float
    retry_at_seconds: float
    code: str
    message: str
    is_final: bool = True


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
class RoomSettled:
    """All models that wait were placed again since the view's `room` was this; those left still wait."""

    room: int


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
    | LoadReported
    | NodeDisconnected
    | NodeUnreachable
    | NodeForgotten
    | ReplicaLost
    | StopOrdered
    | MoveOrdered
    | MoveGivenUp
    | ForecastMissed
    | SchedulingSet
    | StopRefused
    | Demanded
    | DemandEnded
    | Declined
    | StartFailed
    | Refused
    | RefusalLifted
    | RoomSettled
    | Distrusted
)
