"""Values with defaults, so that a test names only what it is about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from services.controller.cluster_view.view import (
    Device,
    Model,
    Node,
    Phase,
    Pool,
    Replica,
    Reservation,
    Stage,
    View,
)
from services.controller.scaling.reading_ahead import Memory
from stoker.ids import CheckpointUri, ModelName, NodeId, ReplicaId, Revision
from stoker.units import GB

NOW_SECONDS = 1000.0


def a_model(name: str = "m", **changes: Any) -> Model:
    """A model of 1 GB."""
    plain = Model(
        name=ModelName(name),
        checkpoint_uri=CheckpointUri(f"/models/{name}"),
        revision=Revision("r1"),
        architecture="LlamaForCausalLM",
        file_bytes=GB,
        weight_bytes=GB,
        runtime="v1",
    )
    return replace(plain, **changes)


def a_node(
    node_id: str = "a", *, devices: int = 1, replicas: tuple[Replica, ...] = (), **changes: Any
) -> Node:
    """A CPU node with a warm worker and a disk of 1 GB/s."""
    plain = Node(
        node_id=NodeId(node_id),
        agent_address=f"{node_id}:7071",
        store_address=f"{node_id}:7072",
        devices=tuple(Device(index=index, kind="cpu", memory_bytes=0) for index in range(devices)),
        replicas={replica.replica_id: replica for replica in replicas},
        stages={"disk": Stage(bytes_per_second=GB)},
        pool=Pool(total_bytes=100 * GB),
        warm_workers=1,
        last_seen_seconds=NOW_SECONDS,
    )
    return replace(plain, **changes)


def a_replica(replica_id: str = "r", model: str = "m", **changes: Any) -> Replica:
    """A ready replica on slot 0 that has been idle for a minute."""
    plain = Replica(
        replica_id=ReplicaId(replica_id),
        model=ModelName(model),
        phase=Phase.READY,
        idle_since_seconds=NOW_SECONDS - 60,
        ready_since_seconds=NOW_SECONDS - 100,
    )
    return replace(plain, **changes)


def a_reservation(replica_id: str = "r", model: str = "m", node_id: str = "a", **changes: Any) -> Reservation:
    """The reservation of slot 0, reported already."""
    plain = Reservation(
        replica_id=ReplicaId(replica_id),
        model=ModelName(model),
        node_id=NodeId(node_id),
        devices=(0,),
        runtime="v1",
        seen_seconds=NOW_SECONDS - 100,
        reported=True,
    )
    return replace(plain, **changes)


def a_view(
    *,
    models: tuple[Model, ...] = (),
    nodes: tuple[Node, ...] = (),
    reservations: tuple[Reservation, ...] = (),
    **changes: Any,
) -> View:
    """A view of these."""
    return View(
        models={model.name: model for model in models},
        nodes={node.node_id: node for node in nodes},
        reservations={reservation.replica_id: reservation for reservation in reservations},
        always=frozenset(model.name for model in models if model.min_replicas),
        **changes,
    )


def a_memory(view: View) -> Memory:
    """What choosing between checkpoints in memory needs, where no model is likely to be asked for."""
    return Memory(
        view=view,
        now_seconds=NOW_SECONDS,
        rests={},
        names={model.checkpoint: name for name, model in view.models.items()},
        chance=lambda _: 0.0,
        most_chance=0.5,
    )
