"""Can a node take a model: never, not now, or now? Pure questions about slots and the store's pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.controller.attention import EMPTY
from services.controller.estimate import LearntParts, learnt_parts
from services.controller.fleet import Member, member
from services.controller.index import Index, index_of, reservations_on
from services.controller.lessons import starts_like
from services.controller.summary import holds_all
from services.controller.view import Checkpoint, Device, Held, Model, Node, Policy, View
from stoker.ids import ModelName, NodeId
from stoker.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Never:
    """Why a node can never take a model."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is the same for every node of one decision.

    Attributes:
        view: The cluster.
        index: Its summaries.
        model: What is to start.
        parts: What a start of it takes on any node.
        now_seconds: The view's clock.
        policy: Constants.
        may_disturb: Replicas of other models may be stopped or moved for it.
        waited_too_long: Nobody may hold it back any more.
    """

    view: View
    index: Index
    model: Model
    parts: LearntParts
    now_seconds: float
    policy: Policy
    may_disturb: bool = True
    waited_too_long: bool = False


def situation_of(
    view: View, name: ModelName, now_seconds: float, policy: Policy, *, may_disturb: bool = True
) -> Situation:
    """Return what every node of a decision about `name` shares."""
    demand = view.demands.get(name)
    return Situation(
        view=view,
        index=index_of(view),
        model=view.models[name],
        parts=learnt_parts(view.models[name], starts_like(view, view.models[name])),
        now_seconds=now_seconds,
        policy=policy,
        may_disturb=may_disturb,
        waited_too_long=demand is not None
        and now_seconds - demand.since_seconds > policy.waiting_bound_seconds,
    )


def devices_needed(model: Model) -> int:
    """Return how many slots of one node a replica occupies."""
    return max(1, model.devices)


def never_fits(model: Model, node: Node) -> Never | None:
    """Return why this node can never take the model; None when it can, sooner or later."""
    if not model.required_labels <= node.labels:
        missing = ", ".join(f"{key}={value}" for key, value in sorted(model.required_labels - node.labels))
        return Never(code="does_not_fit", reason=f"{node.node_id}: it does not carry the label {missing}")
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
    if len(fitting_devices(model, node)) < devices_needed(model):
        return Never(code="does_not_fit", reason=_too_small(model, node))
    return None


def _too_small(model: Model, node: Node) -> str:
    if not node.devices:
        return f"{node.node_id}: it has no device"
    if len(node.devices) < devices_needed(model):
        return f"{node.node_id}: a replica needs {devices_needed(model)} devices, it has {len(node.devices)}"
    largest_bytes = max(device.memory_bytes for device in node.devices)
    return (
        f"{node.node_id}: a replica needs {format_bytes(device_bytes(model, 'cuda'))} on a device, "
        f"the largest has {format_bytes(largest_bytes)}"
    )


def device_bytes(model: Model, kind: str) -> int:
    """Return what one replica needs on each of its devices: on a CPU the weights are the pool's memory."""
    weight_bytes = 0 if kind == "cpu" else model.weight_bytes
    return -(-(model.kv_cache_bytes + weight_bytes) // devices_needed(model))


def fitting_devices(model: Model, node: Node) -> tuple[Device, ...]:
    """Return the slots that are large enough, whoever occupies them."""
    on_cpu_bytes, on_other_bytes = device_bytes(model, "cpu"), device_bytes(model, "cuda")
    return tuple(
        device
        for device in node.devices
        if not device.memory_bytes
        or device.memory_bytes >= (on_cpu_bytes if device.kind == "cpu" else on_other_bytes)
    )


def free_devices(
    situation: Situation, node: Node, given_up: tuple[Member, ...] = (), model: Model | None = None
) -> tuple[int, ...]:
    """Return the free slots that are large enough, once `given_up` are gone; the smallest devices first."""
    free = set(situation.index.summaries[node.node_id].free)
    free.update(device for victim in given_up for device in victim.reservation.devices)
    fitting = fitting_devices(model or situation.model, node)
    found = [device for device in fitting if device.index in free]
    found.sort(key=lambda device: (device.memory_bytes, device.index))
    return tuple(device.index for device in found)


def pool_has_room(
    situation: Situation, node: Node, given_up: tuple[Member, ...] = (), coming: Iterable[Model] = ()
) -> bool:
    """Tell whether the pool can take the checkpoint by evicting what nobody leases.

    Args:
        situation: What the decision is about; `coming` overrides its model.
        node: Whose pool.
        given_up: Replicas that end before.
        coming: What is to be taken, each checkpoint once; empty = the decision's model.
    """
    if not node.pool.total_bytes:
        return True
    wanted: dict[Checkpoint, int] = {}
    for model in tuple(coming) or (situation.model,):
        if not node.held.get(model.checkpoint, NOTHING_HELD).leases:
            wanted[model.checkpoint] = model.file_bytes
    if not wanted:
        return True
    ordered = dict(situation.index.summaries[node.node_id].coming)
    for checkpoint in wanted:
        ordered.pop(checkpoint, None)  # two replicas of one checkpoint share its place
    free_bytes = (
        node.pool.total_bytes
        - node.pool.leased_bytes
        - sum(ordered.values())
        + _freed_pool_bytes(situation, node, given_up)
    )
    return free_bytes >= sum(wanted.values())


NOTHING_HELD = Held()


def enough(situation: Situation, node: Node, given_up: tuple[Member, ...]) -> bool:
    """Tell whether slots and pool suffice, once `given_up` are gone."""
    free = free_devices(situation, node, given_up)
    return len(free) >= devices_needed(situation.model) and pool_has_room(situation, node, given_up)


def on_node(situation: Situation, node: Node) -> tuple[Member, ...]:
    """Return the reserved replicas of a node, by id."""
    found = reservations_on(situation.view, situation.index, node.node_id)
    return tuple(member(situation.view, reservation) for reservation in found)


def live_replicas(situation: Situation, name: ModelName) -> int:
    """Return how many replicas of a model are ready or starting, those that move away not counted."""
    return situation.index.tallies.get(name, EMPTY).live


def has_peer(situation: Situation, model: Model, node_id: NodeId) -> bool:
    """Tell whether another reachable node holds all of the model's checkpoint."""
    if model.origin == "disk":
        return False
    nodes = situation.view.nodes
    return any(
        holder != node_id
        and nodes[holder].reachable
        and holds_all(nodes[holder].held.get(model.checkpoint), model.file_bytes)
        for holder in situation.index.holders.get(model.checkpoint, ())
    )


def _freed_pool_bytes(situation: Situation, node: Node, given_up: tuple[Member, ...]) -> int:
    leaving: Mapping[Checkpoint, int] = Counter(
        situation.view.models[found.reservation.model].checkpoint for found in given_up
    )
    return sum(
        held.dram_bytes
        for checkpoint, count in leaving.items()
        if (held := node.held.get(checkpoint)) and 0 < held.leases <= count
    )
