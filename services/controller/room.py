"""Can a node take a model: never, not now, or now? Pure questions about slots and the store's pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from services.controller.estimate import loading_bytes_by_node
from services.controller.fleet import Member, Standing, member, taken_devices
from services.controller.view import Device, Held, Model, Node, Policy, View
from stoker.ids import ModelName, NodeId
from stoker.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Never:
    """Why a node can never take a model."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is the same for every node of one decision, computed once."""

    view: View
    model: Model
    now_seconds: float
    policy: Policy
    taken: Mapping[NodeId, frozenset[int]]
    loading_bytes: Mapping[NodeId, int]
    starting_workers: Mapping[NodeId, int]
    live: Mapping[ModelName, int]
    members: Mapping[NodeId, tuple[Member, ...]]


def situation_of(view: View, name: ModelName, now_seconds: float, policy: Policy) -> Situation:
    """Return what every node of a decision about `name` shares."""
    members: dict[NodeId, list[Member]] = {}
    live: Counter[ModelName] = Counter()
    starting: Counter[NodeId] = Counter()
    for replica_id in sorted(view.reservations):
        found = member(view, view.reservations[replica_id])
        members.setdefault(found.reservation.node_id, []).append(found)
        live[found.reservation.model] += found.standing in (Standing.STARTING, Standing.READY)
        starting[found.reservation.node_id] += found.replica is None and found.standing is Standing.STARTING
    return Situation(
        view=view,
        model=view.models[name],
        now_seconds=now_seconds,
        policy=policy,
        taken=taken_devices(view),
        loading_bytes=loading_bytes_by_node(view),
        starting_workers=starting,
        live=live,
        members={node_id: tuple(found) for node_id, found in members.items()},
    )


def devices_needed(model: Model, node: Node) -> int:
    """Return how many slots of this node one replica occupies: one, until ranks are served."""
    del model, node
    return 1


def never_fits(model: Model, node: Node) -> Never | None:
    """Return why this node can never take the model; None when it can, sooner or later."""
    if node.architectures and model.architecture not in node.architectures:
        return Never(
            code="checkpoint_invalid",
            reason=f"{node.node_id}: its engines don't serve {model.architecture}",
        )
    if 0 < node.pool.total_bytes < model.file_bytes:
        return Never(
            code="does_not_fit",
            reason=(
                f"{node.node_id}: the checkpoint has {format_bytes(model.file_bytes)}, the store's pool "
                f"{format_bytes(node.pool.total_bytes)}"
            ),
        )
    if len(_fitting(model, node)) < devices_needed(model, node):
        largest_bytes = max((device.memory_bytes for device in node.devices), default=0)
        return Never(
            code="does_not_fit",
            reason=(
                f"{node.node_id}: a replica needs {format_bytes(_device_bytes(model, 'cuda'))} on a device, "
                f"the largest has {format_bytes(largest_bytes)}"
                if node.devices
                else f"{node.node_id}: it has no device"
            ),
        )
    return None


def free_devices(situation: Situation, node: Node, given_up: tuple[Member, ...] = ()) -> tuple[int, ...]:
    """Return the free slots that are large enough, once `given_up` are stopped; sorted."""
    freed = {device for victim in given_up for device in victim.reservation.devices}
    taken = situation.taken.get(node.node_id, frozenset()) - freed
    fitting = _fitting(situation.model, node)
    return tuple(sorted(device.index for device in fitting if device.index not in taken))


def pool_has_room(situation: Situation, node: Node, given_up: tuple[Member, ...] = ()) -> bool:
    """Tell whether the pool can take the checkpoint by evicting what nobody leases."""
    model = situation.model
    held = node.held.get((model.checkpoint_uri, model.revision), Held())
    if not node.pool.total_bytes or held.leases:
        return True
    coming_bytes = sum(_unleased_bytes(situation.view, found, node) for found in on_node(situation, node))
    freed_bytes = _freed_pool_bytes(situation.view, node, given_up)
    free_bytes = node.pool.total_bytes - node.pool.leased_bytes - coming_bytes + freed_bytes
    return free_bytes >= model.file_bytes


def enough(situation: Situation, node: Node, given_up: tuple[Member, ...]) -> bool:
    """Tell whether slots and pool suffice, once `given_up` are stopped."""
    free = free_devices(situation, node, given_up)
    return len(free) >= devices_needed(situation.model, node) and pool_has_room(situation, node, given_up)


def on_node(situation: Situation, node: Node) -> tuple[Member, ...]:
    """Return the reserved replicas of a node, by id."""
    return situation.members.get(node.node_id, ())


def _device_bytes(model: Model, kind: str) -> int:
    """Return what one replica needs on a device: on a CPU the weights are the pool's memory."""
    return model.kv_cache_bytes + (0 if kind == "cpu" else model.weight_bytes)


def _fitting(model: Model, node: Node) -> tuple[Device, ...]:
    return tuple(
        device
        for device in node.devices
        if not device.memory_bytes or device.memory_bytes >= _device_bytes(model, device.kind)
    )


def _unleased_bytes(view: View, found: Member, node: Node) -> int:
    """Return what a replica that was just ordered will lease, as long as the store does not show it."""
    model = view.models.get(found.reservation.model)
    if model is None or found.standing is not Standing.STARTING:
        return 0
    held = node.held.get((model.checkpoint_uri, model.revision), Held())
    return 0 if held.leases else model.file_bytes


def _freed_pool_bytes(view: View, node: Node, given_up: tuple[Member, ...]) -> int:
    models = [view.models[found.reservation.model] for found in given_up]
    leaving = Counter((model.checkpoint_uri, model.revision) for model in models)
    return sum(
        held.dram_bytes
        for key, count in leaving.items()
        if (held := node.held.get(key)) and 0 < held.leases <= count
    )
