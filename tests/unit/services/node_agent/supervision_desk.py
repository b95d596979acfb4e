"""A desk that feeds events to the state machine of supervision, and what must hold after each."""

from __future__ import annotations

from typing import Any

from services.node_agent.host_state import (
    Effect,
    EndWorker,
    Event,
    HostState,
    LoadSucceeded,
    Policy,
    ReplicaPhase,
    SpawnWorker,
    StartOrdered,
    StopOrdered,
    Tick,
    WeightsArrived,
    WeightsLost,
    WorkerExited,
    WorkerPhase,
    WorkerWarm,
)
from services.node_agent.supervision import handle
from stoker.ids import ReplicaId, WorkerId
from stoker.v1.node_agent_pb2 import StartReplicaRequest
from stoker.v1.start_pb2 import StartTimings
from stoker.v1.worker_pb2 import LoadModelResponse


class Desk:
    """Feeds events to the state machine and keeps what came of them."""

    def __init__(self, **policy: Any) -> None:
        self.policy = Policy(**({"devices": (0, 1), "worker_prefix": "w"} | policy))
        self.state = HostState()
        self.now = 100.0
        self.effects: tuple[Effect, ...] = ()

    def take(self, event: Event, *, after: float = 0.0) -> tuple[Effect, ...]:
        """Take an event, some seconds after the last one."""
        self.now += after
        self.state, self.effects = handle(self.policy, self.state, event, self.now)
        check_invariants(self.state)
        return self.effects

    def start(self, replica: str = "rep-1", *devices: int, fence: int = 1) -> tuple[Effect, ...]:
        """Order a replica."""
        order = StartReplicaRequest(replica_id=replica, devices=devices or (0,), fence=fence)
        return self.take(StartOrdered(order=order))

    def stop(self, replica: str = "rep-1", **order: Any) -> tuple[Effect, ...]:
        """Order a replica gone."""
        fields = {"only_if_idle": False, "grace_seconds": 0.0, "fence": 1, "session_count": 0} | order
        return self.take(StopOrdered(replica_id=ReplicaId(replica), **fields))

    def warm(self, worker: str) -> tuple[Effect, ...]:
        """A worker is warm."""
        return self.take(WorkerWarm(worker_id=WorkerId(worker)))

    def exit(self, worker: str, **when: Any) -> tuple[Effect, ...]:
        """A worker was killed."""
        return self.take(WorkerExited(worker_id=WorkerId(worker), reason="killed by SIGKILL"), **when)

    def loaded(self, worker: str, *, loading: bool = False) -> tuple[Effect, ...]:
        """A worker has loaded, or takes sessions while it does."""
        response = LoadModelResponse(max_batch=8, loading=loading)
        return self.take(LoadSucceeded(worker_id=WorkerId(worker), response=response))

    def loading(self) -> None:
        """Bring replica rep-1 to where it takes sessions while its weights arrive at worker w-1."""
        self.take(Tick())
        self.warm("w-1")
        self.start("rep-1")
        self.loaded("w-1", loading=True)

    def arrived(self, worker: str, **when: Any) -> tuple[Effect, ...]:
        """All weights are there."""
        timings = StartTimings(weights_seconds=2.0)
        return self.take(WeightsArrived(worker_id=WorkerId(worker), timings=timings), **when)

    def lost(self, worker: str) -> tuple[Effect, ...]:
        """The weights will not come."""
        return self.take(
            WeightsLost(worker_id=WorkerId(worker), error_code="load_failed", error_message="disk broke")
        )

    def ready(self, replica: str = "rep-1", device: int = 0) -> str:
        """Bring a replica up with a warm worker; returns the worker."""
        self.start(replica, device)
        worker = self.state.replicas[ReplicaId(replica)].worker_id
        while worker is None:
            self.warm(self.spawning()[0])
            worker = self.state.replicas[ReplicaId(replica)].worker_id
        self.loaded(worker)
        return worker

    def spawning(self) -> list[str]:
        """Return the workers that are starting."""
        return [w.worker_id for w in self.state.workers.values() if w.phase is WorkerPhase.SPAWNING]

    def phase(self, replica: str = "rep-1") -> ReplicaPhase | None:
        """Return a replica's phase; None when there is none."""
        hosted = self.state.replicas.get(ReplicaId(replica))
        return hosted.phase if hosted is not None else None


def pooled(**policy: Any) -> Desk:
    """Return a desk whose pool has one warm worker, w-1."""
    desk = Desk(**policy)
    desk.take(Tick())
    desk.warm("w-1")
    return desk


def check_invariants(state: HostState) -> None:
    held = [index for worker in state.workers.values() for index in worker.devices]
    assert len(held) == len(set(held)), "a slot is held twice"
    for worker in state.workers.values():
        if worker.phase in (WorkerPhase.LOADING, WorkerPhase.SERVING):
            assert worker.replica_id in state.replicas
    for replica_id, hosted in state.replicas.items():
        assert hosted.replica_id == replica_id
        if hosted.phase is ReplicaPhase.READY:
            assert hosted.worker_id is not None
            assert state.workers[hosted.worker_id].phase is WorkerPhase.SERVING
            assert hosted.loaded is not None
            assert len(phases := phases_of(state, replica_id)) == max(
                1, hosted.order.checkpoint.tensor_parallel
            )
            assert set(phases) <= {WorkerPhase.SERVING, WorkerPhase.LOADING}
            assert hosted.is_loading or set(phases) == {WorkerPhase.SERVING}
        if hosted.phase is ReplicaPhase.FAILED:
            assert hosted.error_code
            assert set(phases_of(state, replica_id)) <= {WorkerPhase.ENDING}, "a rank is left behind"


def phases_of(state: HostState, replica_id: ReplicaId) -> list[WorkerPhase]:
    return [worker.phase for worker in state.workers.values() if worker.replica_id == replica_id]


def spawned(effects: tuple[Effect, ...]) -> list[str]:
    return [effect.worker_id for effect in effects if isinstance(effect, SpawnWorker)]


def ended(effects: tuple[Effect, ...]) -> list[str]:
    return [effect.worker_id for effect in effects if isinstance(effect, EndWorker)]


def start_ranks(desk: Desk, replica: str = "rep-1", devices: tuple[int, ...] = (0, 1)) -> tuple[Effect, ...]:
    """Order a replica whose checkpoint is cut for two ranks."""
    order = StartReplicaRequest(replica_id=replica, devices=devices, fence=1)
    order.checkpoint.tensor_parallel = 2
    return desk.take(StartOrdered(order=order))


def ranks_ready(desk: Desk) -> tuple[str, str]:
    """Bring a replica of two ranks up; returns its workers."""
    start_ranks(desk)
    for worker in desk.spawning():
        desk.warm(worker)
    first, second = [w.worker_id for w in desk.state.workers.values() if w.replica_id == "rep-1"]
    desk.loaded(second)
    desk.loaded(first)
    return first, second
