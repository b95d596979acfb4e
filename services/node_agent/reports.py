"""The node's report: what is true on the host, as one value. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.node_agent.devices import Memory
from services.node_agent.host_state import Hosted, HostState, ReplicaPhase
from stoker.ids import ReplicaId
from stoker.v1.checkpoint_store_pb2 import StoreStatus
from stoker.v1.node_agent_pb2 import (
    REPLICA_STATE_FAILED,
    REPLICA_STATE_READY,
    REPLICA_STATE_STARTING,
    REPLICA_STATE_STOPPING,
    Device,
    MigrationMeasured,
    NodeReport,
    Replica,
)
from stoker.v1.start_pb2 import StartTimings

STATES = {
    ReplicaPhase.STARTING: REPLICA_STATE_STARTING,
    ReplicaPhase.READY: REPLICA_STATE_READY,
    ReplicaPhase.STOPPING: REPLICA_STATE_STOPPING,
    ReplicaPhase.FAILED: REPLICA_STATE_FAILED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What does not change while the agent runs."""

    node_id: str
    boot_id: str
    agent_address: str
    store_address: str
    devices: Sequence[Device]
    labels: Mapping[str, str]
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a replica's worker is doing."""

    running_sessions: int = 0
    waiting_sessions: int = 0
    longest_wait_seconds: float | None = None
    """Of those that wait; None = none does."""
    idle_seconds: float = 0.0
    context_tokens: int = 0
    """Prompt and output so far, over the running sessions."""
    worker_pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What was seen besides supervision's state."""

    loads: Mapping[ReplicaId, Load]
    memory: Memory
    store: StoreStatus | None
    """None while the store cannot be reached."""
    architectures: Sequence[str]
    worker_start_seconds: float
    next_worker_seconds: float
    """Until the next worker of the pool is warm, expected; 0 = none is being started."""
    unix_minus_monotonic_seconds: float
    migrations: Sequence[MigrationMeasured] = ()
    """The last sessions that moved here, oldest first."""


def build_report(identity: Identity, state: HostState, seen: Observed, sequence: int) -> NodeReport:
    """Return the report of this moment."""
    return NodeReport(
        node_id=identity.node_id,
        boot_id=identity.boot_id,
        sequence=sequence,
        agent_address=identity.agent_address,
        store_address=identity.store_address,
        devices=identity.devices,
        replicas=[_replica(identity.node_id, hosted, seen) for hosted in state.replicas.values()],
        warm_workers=state.warm_count(),
        memory_bytes=seen.memory.total_bytes,
        memory_free_bytes=seen.memory.free_bytes,
        store=seen.store,
        architectures=seen.architectures,
        draining=state.draining,
        labels=identity.labels,
        version=identity.version,
        worker_start_seconds=seen.worker_start_seconds,
        next_worker_seconds=seen.next_worker_seconds,
        migrations=[
            MigrationMeasured(
                migration_id=moved.migration_id,
                model=moved.model,
                path=moved.path,
                tokens=moved.tokens,
                seconds=moved.seconds,
                to_node_id=identity.node_id,
            )
            for moved in seen.migrations
        ],
    )


def _replica(node_id: str, hosted: Hosted, seen: Observed) -> Replica:
    load = seen.loads.get(hosted.replica_id, Load())
    replica = Replica(
        replica_id=hosted.replica_id,
        model=hosted.order.spec.name,
        revision=hosted.order.checkpoint.revision,
        state=STATES[hosted.phase],
        devices=hosted.devices,
        running_sessions=load.running_sessions,
        waiting_sessions=load.waiting_sessions,
        idle_seconds=load.idle_seconds,
        context_tokens=load.context_tokens,
        error_code=hosted.error_code,
        error_message=hosted.error_message,
        worker_pid=load.worker_pid,
        longest_wait_seconds=load.longest_wait_seconds,
        node_id=node_id,
        timings=start_timings(hosted),
    )
    if hosted.loaded is not None:
        replica.max_context_tokens = hosted.loaded.max_context_tokens
        replica.max_batch = hosted.loaded.max_batch
        replica.numerics = hosted.loaded.numerics
        replica.ready_unix_seconds = hosted.ready_seconds + seen.unix_minus_monotonic_seconds
        replica.loading = hosted.is_loading
        replica.loaded_fraction = loaded_fraction(hosted, seen.store) if hosted.is_loading else 1.0
    elif hosted.phase is ReplicaPhase.STARTING:
        replica.loaded_fraction = loaded_fraction(hosted, seen.store)
    return replica


def start_timings(hosted: Hosted) -> StartTimings:
    """Return the stages of a replica's start that are known: the worker's own, the agent's, the order's."""
    timings = StartTimings()
    if hosted.loaded is not None:
        timings.CopyFrom(hosted.loaded.timings)
        began_seconds = hosted.ordered_seconds - hosted.order.placement_seconds
        timings.ready_seconds = hosted.ready_seconds - began_seconds
        if not hosted.is_loading:
            timings.total_seconds = max(hosted.ready_seconds, hosted.complete_seconds) - began_seconds
    if hosted.worker_id is not None:
        timings.worker_seconds = hosted.handed_seconds - hosted.ordered_seconds
    timings.placement_seconds = hosted.order.placement_seconds
    timings.predicted_seconds = hosted.order.predicted_seconds
    return timings


def loaded_fraction(hosted: Hosted, store: StoreStatus | None) -> float:
    """Return how much of a replica's weight files the store has in memory, in [0, 1]."""
    wanted = hosted.order.checkpoint
    if store is None or wanted.file_bytes == 0:
        return 0.0
    for stored in store.checkpoints:
        if stored.checkpoint.uri == wanted.uri and stored.checkpoint.revision == wanted.revision:
            return min(1.0, stored.dram_bytes / wanted.file_bytes)
    return 0.0
