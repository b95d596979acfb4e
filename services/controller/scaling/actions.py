"""What `reconcile` decides: actions for the shell, and the back-off of failed starts. Pure values."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.controller.cluster_view.estimate import Estimate
from services.controller.cluster_view.events import (
    ForecastMissed,
    MoveGivenUp,
    NodeForgotten,
    NodeUnreachable,
    RefusalLifted,
    Refused,
    ReplicaLost,
    RoomSettled,
    StartFailed,
)
from services.controller.cluster_view.foreseen import Foreseen
from services.controller.cluster_view.view import Policy, View
from services.controller.placement.options import Option
from services.controller.placement.place import Decision
from stoker.errors import PeerError, WorkerDied
from stoker.ids import ModelName, NodeId, ReplicaId

MORTAL = frozenset({WorkerDied.code, PeerError.code})
"""Codes of starts under which a process died: a worker, or the store it loads from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Reserve these slots, then order the start."""

    model: ModelName
    node_id: NodeId
    devices: tuple[int, ...]
    runtime: str
    estimate: Estimate
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Order a replica to stop.

    Attributes:
        replica_id: Which.
        node_id: Where it runs.
        only_if_idle: Its agent refuses when a session has come meanwhile.
        reason: For logs.
        for_model: Who gets its room, if anybody.
    """

    replica_id: ReplicaId
    node_id: NodeId
    only_if_idle: bool
    reason: str
    for_model: ModelName | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Delete a reservation from the state."""

    replica_id: ReplicaId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrate:
    """Move a replica: reserve and start it anew at the destination; its sessions follow when that is ready.

    Attributes:
        replica_id: Which moves.
        model: Its model.
        node_id: Where it runs now.
        to_node_id: Where it goes.
        to_devices: Slots it gets there.
        runtime: Its model's.
        estimate: Of the start at the destination.
        move_seconds: Expected for its sessions, after that.
        for_model: Who gets its room, if anybody.
    """

    replica_id: ReplicaId
    model: ModelName
    node_id: NodeId
    to_node_id: NodeId
    to_devices: tuple[int, ...]
    runtime: str
    estimate: Estimate
    move_seconds: float
    for_model: ModelName | None

    @property
    def start(self) -> Start:
        """What it begins with: the replica at the destination."""
        return Start(
            model=self.model,
            node_id=self.to_node_id,
            devices=self.to_devices,
            runtime=self.runtime,
            estimate=self.estimate,
            options=(),
        )


Noted = (
    NodeUnreachable
    | NodeForgotten
    | ReplicaLost
    | StartFailed
    | Refused
    | RefusalLifted
    | RoomSettled
    | MoveGivenUp
    | ForecastMissed
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Fold this; nothing else is to be done."""

    event: Noted


Action = Start | Stop | Migrate | Release | Note


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now, in order; and when to decide again at the latest (None = on the next event)."""

    actions: tuple[Action, ...]
    next_due_seconds: float | None
    decisions: tuple[tuple[ModelName, Decision], ...] = ()
    """What was decided about each model that wanted a replica, for explanations."""
    foreseen: tuple[Foreseen, ...] = field(default=(), compare=False, repr=False)
    """Folds made on the way, for who carries it out."""


def backoff_seconds(failures_in_a_row: int, policy: Policy) -> float:
    """Return how long a model rests after its n-th failed start in a row: doubling, bounded."""
    doublings = min(max(0, failures_in_a_row - 1), 32)
    return min(policy.backoff_limit_seconds, policy.backoff_first_seconds * 2.0**doublings)


def start_failed(  # noqa: PLR0913 - a failure's facts, each named by its caller
    view: View, name: ModelName, *, code: str, message: str, now_seconds: float, policy: Policy
) -> StartFailed:
    """Return the event of one more failed start of a model, with its back-off.

    A process that died says nothing of the model: it is started once more for those who wait, the first
    time a worker dies at once, and they are told only of the `start_attempts`-th failure in a row.
    """
    before = view.failures.get(name)
    count = (before.count if before else 0) + 1
    is_final = code not in MORTAL or count >= policy.start_attempts
    rest_seconds = 0.0 if code == WorkerDied.code and count == 1 else backoff_seconds(count, policy)
    return StartFailed(
        model=name,
        now_seconds=now_seconds,
        retry_at_seconds=now_seconds + rest_seconds,
        code=code,
        message=message if count == 1 else f"{message} (start {count} in a row that failed)",
        is_final=is_final,
    )
