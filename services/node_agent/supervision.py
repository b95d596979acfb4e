"""What to do about workers and replicas: a pure state machine, `handle(state, event) -> (state, effects)`.

Rules:
1. A slot is held by at most one worker process, from the hand-over of an order until that process has ended.
2. A worker loads one model in its life; a worker that failed or lost its replica is ended and replaced.
3. Orders are idempotent by replica id; an order with a lower fence than the highest seen is refused.
4. A failed replica stays, and is reported, until it is ordered to stop.
5. A replica may take sessions before its weights are there: it counts as loading, and fails with its load.
6. How many workers wait for orders: `worker_pool`; which make up a replica: `replica_workers`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from services.node_agent.host_state import (
    DrainOrdered,
    Effect,
    EndWorker,
    Event,
    FailSessions,
    FenceSeen,
    Hosted,
    HostState,
    LoadRefused,
    LoadSucceeded,
    Policy,
    PoolWanted,
    ReplicaPhase,
    SessionsEnded,
    SpawnWorker,
    StartOrdered,
    StopOrdered,
    Tick,
    WakeAt,
    WeightsArrived,
    WeightsLost,
    Worker,
    WorkerExited,
    WorkerPhase,
    WorkerWarm,
)
from services.node_agent.workers.replica_workers import (
    handed_over,
    shares_of,
    with_loaded,
    workers_needed,
    workers_of,
)
from services.node_agent.workers.slots import check_slots
from services.node_agent.workers.wake_up import spawn_deadline_seconds, wake_up_seconds
from services.node_agent.workers.worker_pool import (
    POOL,
    at_hand,
    backoff_seconds,
    missing_workers,
    surplus_workers,
    waiting_orders,
)
from stoker.errors import (
    CapacityError,
    Fenced,
    LoadFailed,
    ReplicaBusy,
    ReplicaGone,
    WorkerDied,
)
from stoker.ids import ReplicaId, WorkerId
from stoker.v1.worker_pb2 import LoadModelResponse


def handle(
    policy: Policy, state: HostState, event: Event, now_seconds: float
) -> tuple[HostState, tuple[Effect, ...]]:
    """Return the state after an event, and what to do.

    Args:
        policy: What the operator chose.
        state: Before the event; not changed.
        event: What happened.
        now_seconds: Monotonic time; never lower than in an earlier call.

    Raises:
        Fenced: The order comes from a controller that no longer leads.
        InvalidRequest: The order names no slot, or one this host does not have.
        CapacityError: The slot is taken, or the agent is about to stop.
        ReplicaBusy: Asked to stop only an idle replica, and it isn't.
        ReplicaGone: The order is a late duplicate: the replica was stopped since.
    """
    turn = _Turn(policy, state, now_seconds)
    turn.take(event)
    turn.hand_over_orders()
    turn.refill_pool()
    turn.trim_pool()
    turn.ask_for_wake_up()
    return turn.result()


class _Turn:
    """A draft of the next state, with the effects so far."""

    def __init__(self, policy: Policy, state: HostState, now_seconds: float) -> None:
        self._policy = policy
        self._state = state
        self._now = now_seconds
        self._workers = dict(state.workers)
        self._replicas = dict(state.replicas)
        self._effects: list[Effect] = []

    def result(self) -> tuple[HostState, tuple[Effect, ...]]:
        state = replace(self._state, workers=self._workers, replicas=self._replicas)
        return state, tuple(self._effects)

    def take(self, event: Event) -> None:  # noqa: C901, PLR0912 - one case per event, one line each
        match event:
            case StartOrdered(order=order):
                self._check_fence(order.fence)
                self._start(event)
            case StopOrdered(fence=fence):
                self._check_fence(fence)
                self._stop(event)
            case PoolWanted(count=count):
                self._state = replace(self._state, pool_wanted=count)
            case FenceSeen(fence=fence):
                self._state = replace(self._state, highest_fence=max(fence, self._state.highest_fence))
            case WorkerWarm(worker_id=worker_id):
                if self._phase(worker_id) is WorkerPhase.SPAWNING:
                    self._set_phase(worker_id, WorkerPhase.WARM)
            case WorkerExited():
                self._exited(event)
            case LoadSucceeded():
                self._loaded(event)
            case LoadRefused():
                self._load_refused(event)
            case WeightsArrived():
                self._weights_arrived(event)
            case WeightsLost():
                self._weights_lost(event)
            case SessionsEnded(replica_id=replica_id):
                self._sessions_ended(replica_id)
            case DrainOrdered():
                self._drain()
            case Tick():
                self._pass_deadlines()

    # --- orders ---

    def _check_fence(self, fence: int) -> None:
        highest = self._state.highest_fence
        if fence < highest:
            raise Fenced(
                f"this order carries fence {fence}, but a controller with fence {highest} has spoken: "
                "whoever sent it no longer leads"
            )
        self._state = replace(self._state, highest_fence=fence)

    def _start(self, event: StartOrdered) -> None:
        hosted = Hosted(order=event.order, phase=ReplicaPhase.STARTING, ordered_seconds=self._now)
        replica_id = hosted.replica_id
        if replica_id in self._replicas:
            return
        if replica_id in self._state.retired:
            raise ReplicaGone(f"replica {replica_id} was stopped here; a new start needs a new id")
        if self._state.draining:
            raise CapacityError(f"replica {replica_id} refused: this node agent is about to stop")
        check_slots(self._policy, hosted, self._replicas.values())
        self._replicas[replica_id] = hosted

    def _stop(self, event: StopOrdered) -> None:
        replica_id = event.replica_id
        hosted = self._replicas.get(replica_id)
        if hosted is None or hosted.worker_id is None or hosted.phase is ReplicaPhase.FAILED:
            self._retire(replica_id)
            return
        if event.only_if_idle and event.session_count > 0:
            raise ReplicaBusy(f"replica {replica_id} runs {event.session_count} sessions")
        stop_at_seconds = self._now + max(0.0, event.grace_seconds)
        if hosted.phase is ReplicaPhase.STOPPING:
            stop_at_seconds = min(stop_at_seconds, hosted.stop_at_seconds)
        self._replicas[replica_id] = replace(
            hosted, phase=ReplicaPhase.STOPPING, stop_at_seconds=stop_at_seconds
        )
        if event.session_count == 0 or stop_at_seconds <= self._now:
            self._end_workers_of(hosted)

    def _drain(self) -> None:
        self._state = replace(self._state, draining=True)
        for worker in list(self._workers.values()):
            if worker.phase in POOL:
                self._end(worker.worker_id)
        for hosted in list(self._replicas.values()):
            if hosted.worker_id is None and hosted.phase is ReplicaPhase.STARTING:
                self._fail(hosted, LoadFailed.code, "the node agent stopped before a worker could take it")

    # --- what workers report ---

    def _loaded(self, event: LoadSucceeded) -> None:
        if self._phase(event.worker_id) is not WorkerPhase.LOADING:
            return
        self._set_phase(event.worker_id, WorkerPhase.SERVING)
        worker = replace(self._workers[event.worker_id], loaded=event.response)
        self._workers[event.worker_id] = worker
        self._state = replace(self._state, pool_failures=0)
        hosted = self._replica_of(worker)
        if hosted is not None and hosted.worker_id == worker.worker_id:
            hosted = replace(hosted, phase=ReplicaPhase.READY, ready_seconds=self._now, loaded=event.response)
            self._replicas[hosted.replica_id] = hosted
        if hosted is not None:
            self._complete(hosted)
        if not event.response.loading:
            self._pause_refill()

    def _load_refused(self, event: LoadRefused) -> None:
        if self._phase(event.worker_id) is not WorkerPhase.LOADING:
            return
        worker = self._workers[event.worker_id]
        hosted = self._replica_of(worker)
        if hosted is not None:
            self._lose_load(hosted, worker, event)
        self._end(event.worker_id)

    def _weights_arrived(self, event: WeightsArrived) -> None:
        hosted = self._loading_replica(event.worker_id)
        worker = self._workers.get(event.worker_id)
        if hosted is None or worker is None or worker.loaded is None:
            return
        loaded = LoadModelResponse()
        loaded.CopyFrom(worker.loaded)
        loaded.timings.CopyFrom(event.timings)
        loaded.loading = False
        self._workers[worker.worker_id] = replace(worker, loaded=loaded)
        self._complete(hosted)
        self._pause_refill()

    def _complete(self, hosted: Hosted) -> None:
        workers = workers_of(self._workers.values(), hosted.replica_id)
        self._replicas[hosted.replica_id] = with_loaded(hosted, workers, self._now)

    def _weights_lost(self, event: WeightsLost) -> None:
        hosted = self._loading_replica(event.worker_id)
        if hosted is None:
            return
        self._lose_load(hosted, self._workers[event.worker_id], event)

    def _lose_load(self, hosted: Hosted, worker: Worker, event: LoadRefused | WeightsLost) -> None:
        if hosted.loaded is not None:  # it takes sessions already
            message = f"replica {hosted.replica_id} lost its load: {event.error_message}"
            self._fail_sessions(worker, WorkerDied.code, message)
        if hosted.phase in (ReplicaPhase.STARTING, ReplicaPhase.READY):
            self._fail(hosted, event.error_code, event.error_message)
        self._end_workers_of(hosted)

    def _loading_replica(self, worker_id: WorkerId) -> Hosted | None:
        worker = self._workers.get(worker_id)
        hosted = self._replica_of(worker) if worker is not None else None
        return hosted if hosted is not None and hosted.is_loading else None

    def _pause_refill(self) -> None:
        pause_ends_seconds = self._now + self._policy.refill_pause_seconds
        self._state = replace(self._state, refill_not_before_seconds=pause_ends_seconds)

    def _exited(self, event: WorkerExited) -> None:
        worker = self._workers.pop(event.worker_id, None)
        if worker is None:
            return
        hosted = self._replica_of(worker)
        self._end_workers_of(hosted)
        if hosted is not None and hosted.phase is ReplicaPhase.STOPPING:
            self._fail_sessions(worker, ReplicaGone.code, f"replica {hosted.replica_id} was stopped")
            if not workers_of(self._workers.values(), hosted.replica_id):
                self._retire(hosted.replica_id)
        elif worker.phase in (WorkerPhase.LOADING, WorkerPhase.SERVING):
            doing = "loading" if worker.phase is WorkerPhase.LOADING else "serving"
            message = f"worker {worker.worker_id} ended while {doing} {worker.replica_id}: {event.reason}"
            self._fail_sessions(worker, WorkerDied.code, message)
            if hosted is not None:
                self._fail(hosted, WorkerDied.code, message)
        elif worker.replica_id is None and not self._state.draining and not worker.is_surplus:
            self._count_pool_failure(worker, event.reason)

    def _count_pool_failure(self, worker: Worker, reason: str) -> None:
        lived_seconds = self._now - worker.since_seconds
        was_stable = worker.phase is WorkerPhase.WARM and lived_seconds >= self._policy.stable_seconds
        failures = 1 if was_stable else self._state.pool_failures + 1
        self._state = replace(
            self._state,
            pool_failures=failures,
            spawn_not_before_seconds=self._now + backoff_seconds(self._policy, failures),
        )
        if failures >= self._policy.spawn_attempts:
            for hosted in waiting_orders(self._replicas.values()):
                message = f"{failures} workers in a row did not start here; the last: {reason}"
                self._fail(hosted, LoadFailed.code, message)

    def _sessions_ended(self, replica_id: ReplicaId) -> None:
        hosted = self._replicas.get(replica_id)
        if hosted is not None and hosted.phase is ReplicaPhase.STOPPING:
            self._end_workers_of(hosted)

    # --- what follows from the state ---

    def _pass_deadlines(self) -> None:
        for hosted in list(self._replicas.values()):
            if hosted.phase is ReplicaPhase.STOPPING and hosted.stop_at_seconds <= self._now:
                self._end_workers_of(hosted)
        for worker in list(self._workers.values()):
            if worker.phase is not WorkerPhase.SPAWNING:
                continue
            if spawn_deadline_seconds(self._policy, worker) <= self._now:
                self._end(worker.worker_id)

    def hand_over_orders(self) -> None:
        warm = [worker for worker in self._workers.values() if worker.phase is WorkerPhase.WARM]
        held = {index for worker in self._workers.values() for index in worker.devices}
        for hosted in waiting_orders(self._replicas.values()):
            shares = shares_of(hosted.order)
            if len(warm) < len(shares):
                return
            if held.intersection(hosted.devices):
                continue
            taken, warm = warm[: len(shares)], warm[len(shares) :]
            held.update(hosted.devices)
            first = taken[0].worker_id
            self._replicas[hosted.replica_id] = replace(hosted, worker_id=first, handed_seconds=self._now)
            for worker, load in handed_over(hosted, taken, self._now):
                self._workers[worker.worker_id] = worker
                self._effects.append(load)

    def refill_pool(self) -> None:
        if self._state.spawn_not_before_seconds > self._now:
            return
        for _ in range(self._missing_workers()):
            count = self._state.spawned_count + 1
            self._state = replace(self._state, spawned_count=count)
            worker_id = WorkerId(f"{self._policy.worker_prefix}-{count}")
            self._workers[worker_id] = Worker(
                worker_id=worker_id, phase=WorkerPhase.SPAWNING, since_seconds=self._now
            )
            needed = workers_needed(waiting_orders(self._replicas.values()))
            is_awaited = needed >= at_hand(self._workers.values())
            self._effects.append(SpawnWorker(worker_id=worker_id, is_awaited=is_awaited))

    def trim_pool(self) -> None:
        workers = self._workers.values()
        for worker in surplus_workers(self._policy, self._state, workers, self._replicas.values()):
            self._workers[worker.worker_id] = replace(worker, is_surplus=True)
            self._end(worker.worker_id)

    def ask_for_wake_up(self) -> None:
        at_seconds = wake_up_seconds(
            self._policy,
            self._state,
            self._workers.values(),
            self._replicas.values(),
            now_seconds=self._now,
            is_short=self._missing_workers() > 0,
        )
        if at_seconds < math.inf:
            self._effects.append(WakeAt(at_seconds=at_seconds))

    def _missing_workers(self) -> int:
        return missing_workers(
            self._policy, self._state, self._workers.values(), self._replicas.values(), self._now
        )

    # --- small steps ---

    def _phase(self, worker_id: WorkerId | None) -> WorkerPhase | None:
        worker = self._workers.get(worker_id) if worker_id is not None else None
        return worker.phase if worker is not None else None

    def _set_phase(self, worker_id: WorkerId, phase: WorkerPhase) -> None:
        self._workers[worker_id] = replace(self._workers[worker_id], phase=phase, since_seconds=self._now)

    def _end(self, worker_id: WorkerId | None) -> None:
        if worker_id is not None and self._phase(worker_id) not in (None, WorkerPhase.ENDING):
            self._set_phase(worker_id, WorkerPhase.ENDING)
            self._effects.append(EndWorker(worker_id=worker_id))

    def _end_workers_of(self, hosted: Hosted | None) -> None:
        if hosted is not None:
            for worker in workers_of(self._workers.values(), hosted.replica_id):
                self._end(worker.worker_id)

    def _replica_of(self, worker: Worker) -> Hosted | None:
        return self._replicas.get(worker.replica_id) if worker.replica_id is not None else None

    def _fail(self, hosted: Hosted, code: str, message: str) -> None:
        self._replicas[hosted.replica_id] = replace(
            hosted, phase=ReplicaPhase.FAILED, error_code=code, error_message=message
        )

    def _fail_sessions(self, worker: Worker, code: str, message: str) -> None:
        """End the sessions of a worker's replica, which its first worker has; they end with that one."""
        hosted = self._replica_of(worker)
        first = self._workers.get(hosted.worker_id) if hosted is not None and hosted.worker_id else None
        worker = first or worker
        self._effects.append(FailSessions(worker_id=worker.worker_id, error_code=code, error_message=message))

    def _retire(self, replica_id: ReplicaId) -> None:
        self._replicas.pop(replica_id, None)
        if replica_id not in self._state.retired:
            kept = (*self._state.retired, replica_id)[-self._policy.remembered_replicas :]
            self._state = replace(self._state, retired=kept)
