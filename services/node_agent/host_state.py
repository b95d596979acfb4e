"""What is true on a host, what may happen there, and what to do about it: the values of supervision.

`supervision.handle` maps (state, event) to (state, effects); `host.Host` runs the effects and feeds events.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from stoker.ids import ReplicaId, WorkerId
from stoker.v1.node_agent_pb2 import StartReplicaRequest
from stoker.v1.start_pb2 import StartTimings
from stoker.v1.worker_pb2 import LoadModelResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the operator chose; fixed while the agent runs."""

    devices: tuple[int, ...]
    """Indices of the slots of this host."""
    worker_prefix: str
    """Worker ids are this, a dash and a number: unique over restarts of the agent."""
    prestarted_workers: int = 1
    """Workers kept warm without a model, also while every slot is taken: a swap needs one."""
    max_prestarted_workers: int = 1
    """What a controller's forecasts may raise that to; where `prestarted_workers` is 0 they raise nothing."""
    refill_pause_seconds: float = 0.0
    """After a load: a replica's first forward pass touches all its weights, and a request waits for it."""
    first_backoff_seconds: float = 0.5
    """Pause after the first worker in a row that ended in the pool; doubles with each further one."""
    longest_backoff_seconds: float = 30.0
    stable_seconds: float = 30.0
    """A pool worker that was warm for this long and then ends starts the back-off anew."""
    spawn_timeout_seconds: float = 300.0
    """A worker that isn't warm by then is ended."""
    spawn_attempts: int = 3
    """Workers in a row that fail to start before waiting orders are failed."""
    remembered_replicas: int = 256
    """Ids of stopped replicas kept, to refuse late duplicates of their orders."""


class WorkerPhase(enum.StrEnum):
    """A worker's life, in order; each phase may be followed by ENDING."""

    SPAWNING = "spawning"
    WARM = "warm"
    LOADING = "loading"
    SERVING = "serving"
    ENDING = "ending"


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker process."""

    worker_id: WorkerId
    phase: WorkerPhase
    since_seconds: float
    """When it entered the phase."""
    replica_id: ReplicaId | None = None
    devices: tuple[int, ...] = ()
    """Slots it holds until it has ended."""
    loaded: LoadModelResponse | None = None
    """What it said when it had loaded."""
    is_surplus: bool = False
    """It was ended because the pool needs fewer: its end is no failure."""


class ReplicaPhase(enum.StrEnum):
    """A replica's life, as reported."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosted:
    """A replica this host was ordered to run."""

    order: StartReplicaRequest
    phase: ReplicaPhase
    ordered_seconds: float
    worker_id: WorkerId | None = None
    """Which has its sessions: the first one, where it has several (`workers.replica_workers`). None while it
    waits for workers or devices."""
    handed_seconds: float = 0.0
    """When a worker got it."""
    ready_seconds: float = 0.0
    """When it began to take sessions."""
    complete_seconds: float = 0.0
    """When all its weights were there, if that was later."""
    loaded: LoadModelResponse | None = None
    """What its worker said when it was READY; its timings follow when all weights are there."""
    stop_at_seconds: float = 0.0
    """When STOPPING: end of the grace of its sessions."""
    error_code: str = ""
    error_message: str = ""

    @property
    def replica_id(self) -> ReplicaId:
        """Return the id it was ordered under."""
        return ReplicaId(self.order.replica_id)

    @property
    def is_loading(self) -> bool:
        """Tell whether it takes sessions while weights are still on their way."""
        return self.loaded is not None and self.loaded.loading

    @property
    def devices(self) -> tuple[int, ...]:
        """Return the slots it was reserved."""
        return tuple(self.order.devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostState:
    """Everything supervision remembers."""

    workers: Mapping[WorkerId, Worker] = field(default_factory=dict)
    replicas: Mapping[ReplicaId, Hosted] = field(default_factory=dict)
    """In the order they were ordered."""
    spawned_count: int = 0
    pool_failures: int = 0
    """Workers in a row that ended in the pool."""
    spawn_not_before_seconds: float = 0.0
    refill_not_before_seconds: float = 0.0
    """For workers that no order waits for."""
    highest_fence: int = 0
    retired: tuple[ReplicaId, ...] = ()
    """Ids of replicas stopped lately, oldest first."""
    draining: bool = False
    pool_wanted: int | None = None
    """Warm workers that the controller's forecasts want here; None = as the operator chose."""

    def warm_count(self) -> int:
        """Return how many workers wait for a model."""
        return sum(worker.phase is WorkerPhase.WARM for worker in self.workers.values())


# --- events ---


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolWanted:
    """The controller said how many warm workers its forecasts want here; None = it has no forecast."""

    count: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOrdered:
    """The controller wants a replica here."""

    order: StartReplicaRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class StopOrdered:
    """The controller wants a replica gone."""

    replica_id: ReplicaId
    only_if_idle: bool
    grace_seconds: float
    fence: int
    session_count: int
    """Sessions on it now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceSeen:
    """A controller of this election revision spoke."""

    fence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerWarm:
    """A worker has its imports done."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExited:
    """A worker's process ended, or never came to be."""

    worker_id: WorkerId
    reason: str
    """For people, e.g. `killed by SIGKILL`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSucceeded:
    """A worker takes sessions; its weights may still be on their way."""

    worker_id: WorkerId
    response: LoadModelResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRefused:
    """A worker could not load its model."""

    worker_id: WorkerId
    error_code: str
    error_message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsArrived:
    """A worker that took sessions early has all its weights."""

    worker_id: WorkerId
    timings: StartTimings
    """The worker's, complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsLost:
    """A worker that took sessions early will not get all its weights."""

    worker_id: WorkerId
    error_code: str
    error_message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionsEnded:
    """The last session of a replica ended."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainOrdered:
    """The agent is about to stop: no new replicas, no pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed; a `WakeAt` was due."""


Event = (
    StartOrdered
    | StopOrdered
    | PoolWanted
    | FenceSeen
    | WorkerWarm
    | WorkerExited
    | LoadSucceeded
    | LoadRefused
    | WeightsArrived
    | WeightsLost
    | SessionsEnded
    | DrainOrdered
    | Tick
)


# --- effects ---


@dataclass(frozen=True, slots=True, kw_only=True)
class SpawnWorker:
    """Start a worker process; answer with WorkerWarm or WorkerExited."""

    worker_id: WorkerId
    is_awaited: bool = False
    """An order waits for it; otherwise it is for the pool, and gives way to what runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadModel:
    """Hand an order to a warm worker; answer with LoadSucceeded or LoadRefused."""

    worker_id: WorkerId
    order: StartReplicaRequest
    devices: tuple[int, ...] = ()
    """Of this worker."""
    first_worker_id: WorkerId | None = None
    """Which has the replica's sessions, where it takes several workers."""
    rank: int = 0
    """This worker's place among them."""
    ranks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EndWorker:
    """End a worker's process; answer with WorkerExited."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class FailSessions:
    """End every session of a worker with this error."""

    worker_id: WorkerId
    error_code: str
    error_message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeAt:
    """Send a Tick at this time; the latest one counts."""

    at_seconds: float


Effect = SpawnWorker | LoadModel | EndWorker | FailSessions | WakeAt
