"""How many workers a host should have without a model: for orders that wait, and in the pool. Pure.

Rules:
1. The pool is refilled only while nothing loads, and a pause after it, and at low priority: importing an
   engine takes the processor from cold starts and running sessions.
2. A controller's forecasts raise the pool, within what the operator allows; where no replica may be placed it
   is emptied.
3. Workers that keep ending in the pool are replaced more and more slowly.
4. A worker that was started for an order which has gone since, and is one more than the pool holds, is ended.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from services.node_agent.host_state import Hosted, HostState, Policy, ReplicaPhase, Worker, WorkerPhase
from services.node_agent.workers.replica_workers import workers_needed

POOL = (WorkerPhase.SPAWNING, WorkerPhase.WARM)


def backoff_seconds(policy: Policy, failures: int) -> float:
    """Return the pause before the next worker is started after this many in a row ended in the pool."""
    if failures == 0:
        return 0.0
    doublings = min(failures - 1, 32)
    return min(policy.first_backoff_seconds * 2.0**doublings, policy.longest_backoff_seconds)


def missing_workers(
    policy: Policy,
    state: HostState,
    workers: Collection[Worker],
    replicas: Collection[Hosted],
    now_seconds: float,
) -> int:
    """Return how many workers to start: for waiting orders always, for the pool while nothing loads."""
    is_loading = any(worker.phase is WorkerPhase.LOADING for worker in workers)
    is_arriving = any(hosted.is_loading and hosted.phase is ReplicaPhase.READY for hosted in replicas)
    is_paused = is_loading or is_arriving or state.refill_not_before_seconds > now_seconds
    idle_pool = 0 if state.draining or is_paused else pool_target(policy, state)
    return max(0, workers_needed(waiting_orders(replicas)) + idle_pool - at_hand(workers))


def surplus_workers(
    policy: Policy, state: HostState, workers: Collection[Worker], replicas: Collection[Hosted]
) -> list[Worker]:
    """Return those more than orders and the pool need; those that are still starting first."""
    surplus = at_hand(workers) - workers_needed(waiting_orders(replicas)) - pool_target(policy, state)
    pool = [worker for worker in workers if worker.phase in POOL]
    pool.sort(key=lambda worker: worker.phase is WorkerPhase.WARM)
    return pool[: max(0, surplus)]


def at_hand(workers: Collection[Worker]) -> int:
    """Return how many workers are warm, or will be."""
    return sum(worker.phase in POOL for worker in workers)


def pool_target(policy: Policy, state: HostState) -> int:
    """Return how many workers wait for orders that nobody has given yet."""
    chosen, wanted = policy.prestarted_workers, state.pool_wanted
    if wanted == 0:
        return 0  # no replica will be placed here
    if chosen and wanted is not None:
        chosen = max(chosen, min(wanted, policy.max_prestarted_workers))
    return min(chosen, len(policy.devices))


def waiting_orders(replicas: Collection[Hosted]) -> Sequence[Hosted]:
    """Return the replicas that no worker has taken yet, in the order of their orders."""
    return [
        hosted for hosted in replicas if hosted.phase is ReplicaPhase.STARTING and hosted.worker_id is None
    ]
