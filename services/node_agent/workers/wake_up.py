"""When supervision must look again though nothing happens. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection

from services.node_agent.host_state import Hosted, HostState, Policy, ReplicaPhase, Worker, WorkerPhase


def wake_up_seconds(  # noqa: PLR0913 - what supervision knows
    policy: Policy,
    state: HostState,
    workers: Collection[Worker],
    replicas: Collection[Hosted],
    *,
    now_seconds: float,
    is_short: bool,
) -> float:
    """Return the earliest deadline, infinity where there is none.

    Args:
        policy: Has the time that a worker may take to become warm.
        state: Has the pauses.
        workers: That have not ended.
        replicas: Those that are stopping end at a time of their own.
        now_seconds: Pauses that are over don't count.
        is_short: There are fewer workers than orders and the pool need.
    """
    running = {worker.worker_id for worker in workers if worker.phase is not WorkerPhase.ENDING}
    deadlines = [
        hosted.stop_at_seconds
        for hosted in replicas
        if hosted.phase is ReplicaPhase.STOPPING and hosted.worker_id in running
    ]
    deadlines += [
        spawn_deadline_seconds(policy, worker) for worker in workers if worker.phase is WorkerPhase.SPAWNING
    ]
    if state.spawn_not_before_seconds > now_seconds and is_short:
        deadlines.append(state.spawn_not_before_seconds)
    if state.refill_not_before_seconds > now_seconds:
        deadlines.append(state.refill_not_before_seconds)
    return min(deadlines, default=math.inf)


def spawn_deadline_seconds(policy: Policy, worker: Worker) -> float:
    """Return when a worker that is not warm is ended."""
    return worker.since_seconds + policy.spawn_timeout_seconds
