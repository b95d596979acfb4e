"""What the host's log and metrics say of an event, beside what the host learns from it."""

from __future__ import annotations

from services.node_agent import metrics
from services.node_agent.host_state import (
    Event,
    Hosted,
    HostState,
    LoadRefused,
    LoadSucceeded,
    WeightsArrived,
    WeightsLost,
    WorkerExited,
)
from services.node_agent.reports import start_timings
from stoker import log
from stoker.ids import WorkerId


def tell_event(state: HostState, event: Event) -> None:
    """Log and count an event, given the state after it."""
    match event:
        case WorkerExited(worker_id=worker_id, reason=reason):
            metrics.WORKER_EXITS.inc()
            log.get().info("worker.ended", worker_id=worker_id, reason=reason)
        case LoadSucceeded(worker_id=worker_id) | WeightsArrived(worker_id=worker_id):
            _tell_start(state, worker_id)
        case (
            LoadRefused(worker_id=worker_id, error_code=code, error_message=message)
            | WeightsLost(worker_id=worker_id, error_code=code, error_message=message)
        ):
            metrics.FAILED_STARTS.inc()
            log.get().warning("replica.failed", worker_id=worker_id, error_code=code, message=message)
    metrics.show(state)


def _tell_start(state: HostState, worker_id: WorkerId) -> None:
    worker = state.workers.get(worker_id)
    for hosted in state.replicas.values():
        is_its = worker is not None and worker.replica_id == hosted.replica_id
        if is_its and hosted.loaded is not None and not hosted.is_loading:
            timings = start_timings(hosted)
            metrics.observe_start(timings)
            log.get().info("replica.loaded", **_start_line(hosted), **metrics.stages(timings))


def _start_line(hosted: Hosted) -> dict[str, object]:
    return {
        "replica_id": hosted.replica_id,
        "model": hosted.order.spec.name,
        "worker_id": hosted.worker_id,
        "devices": list(hosted.devices),
        "weight_bytes": hosted.order.checkpoint.weight_bytes,
    }
