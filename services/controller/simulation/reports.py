"""What the simulated node agents report, as the controller's own values. No state, nothing is decided."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from services.controller.cluster_view.events import SessionLoad
from services.controller.cluster_view.frozen import maker_of
from services.controller.cluster_view.learnt import StartStages
from services.controller.cluster_view.view import Checkpoint, Device, Held, Model, Phase, Replica
from services.controller.simulation.hardware import ModelSpec
from services.controller.simulation.parts import Phase as Standing
from services.controller.simulation.parts import SimNode, SimReplica
from services.controller.simulation.world import World
from stoker.ids import CheckpointUri, ModelName, ReplicaId, Revision

_REVISION = Revision("1")
_NO_STAGES = StartStages()
_new_tuple = tuple.__new__
"""Makes a named tuple without the call that names its fields."""
_make_replica, _make_stages = maker_of(Replica), maker_of(StartStages)


def model_of(spec: ModelSpec, world: World) -> Model:
    """Return a model as it is deployed."""
    host = next(iter(world.nodes.values())).spec
    return Model(
        name=spec.name,
        checkpoint_uri=CheckpointUri(f"sim://{spec.name}"),
        revision=_REVISION,
        architecture="simulated",
        file_bytes=spec.weight_bytes,
        weight_bytes=spec.weight_bytes,
        runtime="1",
        keep_alive_seconds=spec.kept_seconds(host),
        max_replicas=spec.max_replicas,
        concurrency=spec.concurrency,
        devices=spec.devices_on(host.device),
        kv_bytes_per_token=spec.kv_bytes_per_token,
    )


def held_on(node: SimNode) -> dict[Checkpoint, Held]:
    """Return what a host holds."""
    if not node.dram:
        return {_checkpoint(name): _holding(0, disk_bytes) for name, disk_bytes in node.stored.items()}
    names = {**node.dram, **node.stored}
    return {_checkpoint(name): _holding(node.dram.get(name, 0), node.stored.get(name, 0)) for name in names}


def held_since(node: SimNode, before: Mapping[Checkpoint, Held]) -> dict[Checkpoint, Held]:
    """Return what a host holds, from what it held before some checkpoints moved."""
    held = dict(before)
    for name in node.moved:
        if name in node.dram or name in node.stored:
            held[_checkpoint(name)] = _holding(node.dram.get(name, 0), node.stored.get(name, 0))
        else:
            held.pop(_checkpoint(name), None)
    return held


@cache
def devices_of(kind: str, memory_bytes: int, count: int) -> tuple[Device, ...]:
    """Return a host's devices."""
    return tuple(Device(index=index, kind=kind, memory_bytes=memory_bytes) for index in range(count))


@cache
def _checkpoint(name: ModelName) -> Checkpoint:
    return (CheckpointUri(f"sim://{name}"), _REVISION)


@cache
def _holding(dram_bytes: int, disk_bytes: int) -> Held:
    return Held(dram_bytes=dram_bytes, disk_bytes=disk_bytes)


def replica_of(replica_id: ReplicaId, replica: SimReplica, world: World) -> Replica:
    """Return a replica as its node agent reports it."""
    ready = replica.phase is Standing.READY
    queue = world.queues[replica.model.name]
    queued = _queued_at(replica, len(queue), world) if ready and queue else 0
    seconds = (replica.ready_seconds or world.now) - replica.began_seconds
    return _make_replica(
        replica_id=replica_id,
        model=replica.model.name,
        phase=Phase.READY if ready else Phase.STARTING,
        devices=replica.devices,
        sessions=len(replica.sessions) + queued,
        waiting_sessions=queued,
        longest_since_seconds=world.serving.longest_since_seconds(replica.model.name) if queued else None,
        idle_since_seconds=replica.idle_since_seconds,
        stages=_make_stages(weights_seconds=seconds, total_seconds=seconds) if ready else _NO_STAGES,
        context_tokens=world.serving.context_tokens(replica),
    )


def session_load(replica_id: ReplicaId, replica: SimReplica, world: World) -> SessionLoad:
    """Return the sessions of a replica, those of its model's queue that wait at it included."""
    queue = world.queues[replica.model.name]
    queued = _queued_at(replica, len(queue), world) if queue and replica.phase is Standing.READY else 0
    longest_since_seconds = world.serving.longest_since_seconds(replica.model.name) if queued else None
    context_tokens = world.serving.context_tokens(replica) if replica.sessions else 0
    sessions, idle_since_seconds = len(replica.sessions) + queued, replica.idle_since_seconds
    name = replica.model.name
    return _new_tuple(
        SessionLoad,
        (replica_id, name, sessions, queued, None, idle_since_seconds, context_tokens, longest_since_seconds),
    )


def _queued_at(replica: SimReplica, waiting: int, world: World) -> int:
    """Return how many of a model's waiting sessions wait at this ready replica: an equal part, none twice."""
    serving = [each for each in world.replicas[replica.model.name] if each.phase is Standing.READY]
    share, rest = divmod(waiting, len(serving))
    return share + (serving.index(replica) < rest)
