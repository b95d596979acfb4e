"""Protos into the view's values, and back into routes; the only module that knows both. Pure."""

from __future__ import annotations

import hashlib

from services.controller.answer import State, is_offered, status
from services.controller.cluster_view.demand import began_seconds
from services.controller.cluster_view.fleet import Member, members_of
from services.controller.cluster_view.learnt import Moved, StartStages, Transferred
from services.controller.cluster_view.view import Device, Held, Model, Node, Phase, Pool, Replica, Stage, View
from services.controller.records import ModelRecord
from stoker.ids import CheckpointUri, ModelName, NodeId, ReplicaId, Revision
from stoker.v1 import controller_pb2, model_pb2, node_agent_pb2, start_pb2

PHASES = {
    node_agent_pb2.REPLICA_STATE_STARTING: Phase.STARTING,
    node_agent_pb2.REPLICA_STATE_READY: Phase.READY,
    node_agent_pb2.REPLICA_STATE_STOPPING: Phase.STOPPING,
    node_agent_pb2.REPLICA_STATE_FAILED: Phase.FAILED,
}
STATES = {
    State.COLD: model_pb2.MODEL_STATE_COLD,
    State.STARTING: model_pb2.MODEL_STATE_STARTING,
    State.READY: model_pb2.MODEL_STATE_READY,
    State.FAILED: model_pb2.MODEL_STATE_FAILED,
    State.WAITING: model_pb2.MODEL_STATE_WAITING,
}
MAX_MOVES_REPORTED = 64
MAX_STORES_IN_ROUTE = 4
"""Stores named to a gateway for a model's small files: any of them has a path to them."""


def runtime_of(spec: model_pb2.ModelSpec, checkpoint: model_pb2.CheckpointInfo) -> str:
    """Return the digest of everything a running replica cannot change: 16 hex digits."""
    parts = (
        checkpoint.uri,
        checkpoint.revision,
        spec.engine,
        spec.dtype,
        str(spec.kv_cache_bytes),
        str(spec.max_context_tokens),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def model_of(record: ModelRecord) -> Model:
    """Return what decisions need of a deployed model."""
    spec, checkpoint = record.spec, record.checkpoint
    return Model(
        name=ModelName(spec.name),
        checkpoint_uri=CheckpointUri(checkpoint.uri),
        revision=Revision(checkpoint.revision),
        architecture=checkpoint.architecture,
        file_bytes=checkpoint.file_bytes,
        weight_bytes=checkpoint.weight_bytes,
        kv_cache_bytes=spec.kv_cache_bytes,
        layers=checkpoint.layers,
        runtime=runtime_of(spec, checkpoint),
        keep_alive_seconds=spec.keep_alive_seconds,
        min_replicas=spec.min_replicas,
        max_replicas=spec.max_replicas,
        concurrency=spec.concurrency,
        devices=max(1, spec.devices),
        pinned=spec.pinned,
        required_labels=frozenset(spec.required_node_labels.items()),
        preferred_labels=frozenset(spec.preferred_node_labels.items()),
        keep_alive_auto=spec.keep_alive_auto,
        kv_bytes_per_token=checkpoint.kv_bytes_per_token,
        origin="remote" if checkpoint.far or _is_remote(checkpoint.uri) else "disk",
    )


def _is_remote(uri: str) -> bool:
    """Tell by its address alone that a checkpoint is far; records of older controllers say nothing else."""
    return "://" in uri and not uri.startswith("file://")


def node_of(report: node_agent_pb2.NodeReport, now_seconds: float) -> Node:
    """Return the node a report describes."""
    replicas = [_replica_of(replica, now_seconds) for replica in report.replicas if replica.state in PHASES]
    store = report.store
    return Node(
        node_id=NodeId(report.node_id),
        agent_address=report.agent_address,
        store_address=report.store_address,
        devices=tuple(
            Device(index=device.index, kind=device.kind, memory_bytes=device.memory_bytes)
            for device in sorted(report.devices, key=lambda device: device.index)
        ),
        replicas={replica.replica_id: replica for replica in replicas},
        held={
            (CheckpointUri(held.checkpoint.uri), Revision(held.checkpoint.revision)): Held(
                dram_bytes=held.dram_bytes, disk_bytes=held.disk_bytes, leases=held.leases
            )
            for held in store.checkpoints
        },
        stages={
            rate.stage: Stage(bytes_per_second=rate.bytes_per_second, queued_bytes=rate.queued_bytes)
            for rate in store.bandwidths
        },
        pool=Pool(
            total_bytes=store.pool.total_bytes,
            free_bytes=store.pool.free_bytes,
            leased_bytes=store.pool.leased_bytes,
            window_bytes=store.pool.window_bytes,
        ),
        architectures=frozenset(report.architectures),
        warm_workers=report.warm_workers,
        worker_start_seconds=report.worker_start_seconds,
        next_worker_seconds=report.next_worker_seconds,
        draining=report.draining,
        labels=frozenset(report.labels.items()),
        moved=tuple(
            Moved(
                migration_id=moved.migration_id,
                model=ModelName(moved.model),
                path=moved.path,
                tokens=moved.tokens,
                seconds=moved.seconds,
            )
            for moved in report.migrations[-MAX_MOVES_REPORTED:]
        ),
        last_seen_seconds=now_seconds,
    )


def _replica_of(replica: node_agent_pb2.Replica, now_seconds: float) -> Replica:
    sessions = replica.running_sessions + replica.waiting_sessions
    return Replica(
        replica_id=ReplicaId(replica.replica_id),
        model=ModelName(replica.model),
        phase=PHASES[replica.state],
        devices=tuple(sorted(replica.devices)),
        sessions=sessions,
        idle_since_seconds=None if sessions else now_seconds - replica.idle_seconds,
        loaded_fraction=replica.loaded_fraction,
        loading=replica.loading,
        stages=stages_of(replica.timings),
        error_code=replica.error_code,
        error_message=replica.error_message,
        max_context_tokens=replica.max_context_tokens,
        max_batch=replica.max_batch,
        numerics=replica.numerics,
        context_tokens=replica.context_tokens,
        waiting_sessions=replica.waiting_sessions,
        longest_since_seconds=(
            began_seconds(replica.longest_wait_seconds, now_seconds)
            if replica.HasField("longest_wait_seconds")
            else None
        ),
        revision=Revision(replica.revision),
    )


def stages_of(timings: start_pb2.StartTimings) -> StartStages:
    """Return the stages estimates learn from."""
    return StartStages(
        worker_seconds=timings.worker_seconds,
        weights_seconds=timings.weights_seconds,
        skeleton_seconds=timings.skeleton_seconds + timings.assign_seconds,
        first_forward_seconds=timings.first_forward_seconds,
        total_seconds=timings.total_seconds,
        transfers=tuple(
            Transferred(tier=transfer.tier, bytes=transfer.bytes, seconds=transfer.seconds)
            for transfer in timings.transfers
        ),
    )


def model_message(view: View, record: ModelRecord, now_seconds: float) -> model_pb2.Model:
    """Return a model as listed: what was deployed, and its state."""
    found = status(view, ModelName(record.spec.name), now_seconds)
    return model_pb2.Model(
        spec=record.spec,
        checkpoint=record.checkpoint,
        generation=record.generation,
        created_unix_seconds=record.created_unix_seconds,
        state=STATES[found.state],
        ready_replicas=found.ready,
        starting_replicas=found.starting,
        message=found.message,
    )


def route_message(view: View, record: ModelRecord, now_seconds: float) -> controller_pb2.Route:
    """Return a model's route: its ready replicas, and the stores that can give its small files."""
    name = ModelName(record.spec.name)
    members = members_of(view, name)
    return controller_pb2.Route(
        model=model_message(view, record, now_seconds),
        replicas=[route_replica(found) for found in members if is_offered(view, found)],
        store_addresses=_stores(view, record),
    )


def route_replica(found: Member) -> controller_pb2.RouteReplica:
    """Return where a ready replica is reached."""
    return controller_pb2.RouteReplica(
        replica_id=found.reservation.replica_id,
        node_id=found.reservation.node_id,
        agent_address=found.node.agent_address if found.node else "",
        max_context_tokens=found.replica.max_context_tokens if found.replica else 0,
        max_batch=found.replica.max_batch if found.replica else 0,
        numerics=found.replica.numerics if found.replica else "",
        revision=(found.replica.revision or "") if found.replica else "",
    )


def _stores(view: View, record: ModelRecord) -> list[str]:
    key = (CheckpointUri(record.checkpoint.uri), Revision(record.checkpoint.revision))
    nodes = [node for node in view.nodes.values() if node.reachable and node.store_address]
    nodes.sort(key=lambda node: (key not in node.held, node.node_id))
    return [node.store_address for node in nodes[:MAX_STORES_IN_ROUTE]]
