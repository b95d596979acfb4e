"""Metrics of the node agent."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.node_agent.host_state import HostState, ReplicaPhase, WorkerPhase
from stoker.metrics import START_STAGE_BUCKETS_SECONDS
from stoker.v1.start_pb2 import StartTimings

STAGES = ("placement", "worker", "attach", "weights", "skeleton", "assign", "first_forward", "total")
"""Stages of a start, as in StartTimings."""

WORKERS = Gauge("stoker_workers", "Worker processes of this host.", ["phase"])
REPLICAS = Gauge("stoker_replicas", "Replicas of this host.", ["state"])
SESSIONS = Gauge("stoker_sessions", "Sessions on this host's replicas.", ["state"])
START_STAGE = Histogram(
    "stoker_replica_start_stage_seconds",
    "Stages of the starts of replicas. Stages overlap.",
    ["stage"],
    buckets=START_STAGE_BUCKETS_SECONDS,
)
LOADED_BYTES = Counter("stoker_start_loaded_bytes", "Bytes read for starts, by tier.", ["tier"])
WORKER_START = Histogram(
    "stoker_worker_start_seconds", "From spawn to warm.", buckets=START_STAGE_BUCKETS_SECONDS
)
WORKER_EXITS = Counter("stoker_worker_exits", "Worker processes that ended.")
KV_BYTES = Counter(
    "stoker_kv_shipped_bytes", "Keys and values of moving sessions, by direction: in, out.", ["direction"]
)
KV_FAILURES = Counter(
    "stoker_kv_not_shipped", "Shipments of keys and values that failed, by cause.", ["direction", "cause"]
)
REFUSED_STRANGERS = Counter(
    "stoker_session_links_refused", "Connections for sessions that brought no ticket, or not in time."
)
FAILED_STARTS = Counter("stoker_failed_starts", "Loads that a worker refused.")


def show(state: HostState) -> None:
    """Set the gauges of workers and replicas."""
    for phase in WorkerPhase:
        count = sum(worker.phase is phase for worker in state.workers.values())
        WORKERS.labels(phase.value).set(count)
    for replica_phase in ReplicaPhase:
        count = sum(hosted.phase is replica_phase for hosted in state.replicas.values())
        REPLICAS.labels(replica_phase.value).set(count)


def stages(timings: StartTimings) -> dict[str, float]:
    """Return the seconds of every stage, for the log line of a start."""
    return {
        f"{stage}_seconds": round(getattr(timings, f"{stage}_seconds"), 4) for stage in (*STAGES, "predicted")
    }


def observe_start(timings: StartTimings) -> None:
    """Count a start that succeeded."""
    for stage in STAGES:
        START_STAGE.labels(stage).observe(getattr(timings, f"{stage}_seconds"))
    for transfer in timings.transfers:
        LOADED_BYTES.labels(transfer.tier).inc(transfer.bytes)
