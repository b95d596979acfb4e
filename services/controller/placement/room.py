"""Can a node take a model: never, not now, or now? Pure questions about slots, pools and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from services.controller.cluster_view.attention import EMPTY
from services.controller.cluster_view.estimate import NOTHING_HELD, LearntParts
from services.controller.cluster_view.fleet import Member, Standing, member
from services.controller.cluster_view.frozen import maker_of
from services.controller.cluster_view.index import Index, index_of, reservations_on
from services.controller.cluster_view.lessons import parts_like
from services.controller.cluster_view.streaming import (
    copy_bytes_on,
    host_bytes,
    own_copy_bytes,
    pool_bytes_on,
    streams,
    streams_on,
)
from services.controller.cluster_view.summary import Shape, Summary, holds_all
from services.controller.cluster_view.view import (
    Checkpoint,
    Device,
    Model,
    Node,
    Policy,
    Reservation,
    View,
)
from stoker.ids import ModelName, NodeId
from stoker.units import format_bytes

SOURCES = 2
"""Nodes remembered that could send a checkpoint: with two there is one beside any node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Never:
    """Why a node can never take a model."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a start of a model takes, wherever it may be.

    Attributes:
        model: What is to start.
        parts: What a start of it takes on any node.
        slots: How many slots of one node it occupies.
        sources: Nodes that could send all of the checkpoint, `SOURCES` at most.
        origin: Where a node that holds nothing gets the bytes from.
        fitting: By a shape's identity the slots large enough, the smallest first, and the shape, so that it
            stays; filled as it is asked for.
    """

    model: Model
    parts: LearntParts
    slots: int
    sources: tuple[NodeId, ...]
    origin: str
    fitting: dict[int, tuple[tuple[int, ...], Shape]] = field(default_factory=dict, compare=False, repr=False)

    def has_peer(self, node_id: NodeId) -> bool:
        """Tell whether another reachable node holds all of the checkpoint."""
        sources = self.sources
        return bool(sources) and (len(sources) > 1 or sources[0] != node_id)

    def slots_that_fit(self, shape: Shape) -> tuple[int, ...]:
        """Return the slots of such a node that are large enough, whoever occupies them, smallest first.

        Empty where the node can never take the model: its engines, its pool or its devices don't suit.
        """
        known = self.fitting.get(id(shape))
        if known is None:
            known = self.fitting[id(shape)] = (_slots_that_fit(self.model, shape), shape)
        return known[0]


_make_wanted = maker_of(Wanted)


def _slots_that_fit(model: Model, shape: Shape) -> tuple[int, ...]:
    if shape.architectures and model.architecture not in shape.architectures:
        return ()
    count = devices_needed(model)
    on_cpu_bytes = _share(model.kv_cache_bytes, count)
    if 0 < shape.pool_bytes < model.file_bytes:
        if not streams(model, pool_bytes=shape.pool_bytes, window_bytes=shape.window_bytes):
            return ()
        on_cpu_bytes = own_copy_bytes(model) + shape.pool_bytes
    found = _large_enough(shape, on_cpu_bytes, _share(model.kv_cache_bytes + model.weight_bytes, count))
    return found if len(found) >= count else ()


@lru_cache(maxsize=4096)
def _large_enough(shape: Shape, on_cpu_bytes: int, on_other_bytes: int) -> tuple[int, ...]:
    found = large_enough(shape.devices, on_cpu_bytes, on_other_bytes)
    return tuple(
        device.index for device in sorted(found, key=lambda device: (device.memory_bytes, device.index))
    )


def wanted_of(view: View, index: Index, name: ModelName) -> Wanted:
    """Return what a start of a deployed model takes."""
    model = view.models[name]
    sources = () if model.origin == "disk" else _sources(view, index, model)
    return _make_wanted(
        model=model,
        parts=parts_like(view, model),
        slots=devices_needed(model),
        sources=sources,
        origin="disk" if model.origin == "disk" else "peer" if sources else "remote",
    )


def _sources(view: View, index: Index, model: Model) -> tuple[NodeId, ...]:
    """Return the first `SOURCES` nodes that could send all of a checkpoint."""
    checkpoint, file_bytes, nodes = model.checkpoint, model.file_bytes, view.nodes
    found: list[NodeId] = []
    for node_id in index.holders.get(checkpoint):
        node = nodes[node_id]
        if node.reachable and holds_all(node.held.get(checkpoint), file_bytes):
            found.append(node_id)
            if len(found) == SOURCES:
                break
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is the same for every node of one decision.

    Attributes:
        view: The cluster.
        index: Its summaries.
        model: What is to start.
        wanted: What a start of it takes.
        now_seconds: The view's clock.
        policy: Constants.
        may_disturb: Replicas of other models may be stopped or moved for it.
        waited_too_long: Nobody may hold it back any more.
        lacking: How many replicas it wants beyond those it has or is getting.
    """

    view: View
    index: Index
    model: Model
    wanted: Wanted
    now_seconds: float
    policy: Policy
    may_disturb: bool = True
    waited_too_long: bool = False
    lacking: int = 1


_make_situation = maker_of(Situation)


def situation_of(  # noqa: PLR0913 - what a decision is about, each named by its caller
    view: View,
    name: ModelName,
    now_seconds: float,
    policy: Policy,
    *,
    may_disturb: bool = True,
    lacking: int = 1,
) -> Situation:
    """Return what every node of a decision about `name` shares."""
    demand, index = view.demands.get(name), index_of(view)
    return _make_situation(
        view=view,
        index=index,
        model=view.models[name],
        wanted=wanted_of(view, index, name),
        now_seconds=now_seconds,
        policy=policy,
        may_disturb=may_disturb,
        lacking=lacking,
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
    on_cpu_bytes, is_streamed = device_bytes(model, "cpu"), streams_on(model, node)
    if is_streamed:
        on_cpu_bytes = own_copy_bytes(model) + node.pool.total_bytes
    elif 0 < node.pool.total_bytes < model.file_bytes:
        return Never(
            code="does_not_fit",
            reason=(
                f"{node.node_id}: the checkpoint has {format_bytes(model.file_bytes)}, the store's pool "
                f"{format_bytes(node.pool.total_bytes)}, too small for a window of it: raise its "
                "STOKER_STORE_POOL_BYTES"
            ),
        )
    fitting = large_enough(node.devices, on_cpu_bytes, device_bytes(model, "cuda"))
    if len(fitting) < devices_needed(model):
        return Never(code="does_not_fit", reason=_too_small(model, node))
    return None


def _too_small(model: Model, node: Node) -> str:
    if copy_bytes_on(model, node) and len(node.devices) >= devices_needed(model):
        return (
            f"{node.node_id}: the checkpoint has {format_bytes(model.file_bytes)}, more than the store's "
            f"pool of {format_bytes(node.pool.total_bytes)}; a copy beside the pool needs "
            f"{format_bytes(own_copy_bytes(model))}, the host has {format_bytes(host_bytes(node.devices))} "
            "in all: use a node with more memory"
        )
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
    return _share(model.kv_cache_bytes + weight_bytes, devices_needed(model))


def _share(byte_count: int, devices: int) -> int:
    """Return what each of some devices holds at most of bytes that they share equally."""
    return -(-byte_count // devices)


def large_enough(devices: Iterable[Device], on_cpu_bytes: int, on_other_bytes: int) -> list[Device]:
    """Return the devices that could hold a replica's share, whoever occupies them; see `device_bytes`."""
    return [
        device
        for device in devices
        if not device.memory_bytes
        or device.memory_bytes >= (on_cpu_bytes if device.kind == "cpu" else on_other_bytes)
    ]


def can_ever(wanted: Wanted, node: Node, summary: Summary) -> bool:
    """Tell whether the node can take the model, sooner or later: `never_fits` without the reason."""
    return bool(wanted.slots_that_fit(summary.shape)) and wanted.model.required_labels <= node.labels


def free_slots(wanted: Wanted, summary: Summary, given_up: Iterable[Reservation] = ()) -> list[int]:
    """Return the free slots that are large enough, once `given_up` are gone; the smallest devices first."""
    free = {*summary.free, *[slot for victim in given_up for slot in victim.devices]}
    return [slot for slot in wanted.slots_that_fit(summary.shape) if slot in free]


def promised_slots(situation: Situation, summary: Summary) -> int:
    """Return how many free slots of a node belong to others: replicas stop there for who needs these, too."""
    promised = 0
    for name in summary.leaving_for:
        model = situation.view.models.get(name)
        if model is not None and name != situation.model.name:
            leaving = [trait.reservation.devices for trait in summary.traits if trait.leaving_for == name]
            promised += max(0, devices_needed(model) - sum(map(len, leaving)))
    return promised


def pool_has_room(
    situation: Situation, node: Node, given_up: tuple[Reservation, ...], coming: Iterable[Model]
) -> bool:
    """Tell whether the pool can take the checkpoints by evicting what nobody leases, and the host the copies.

    Args:
        situation: What the decision is about.
        node: Whose pool.
        given_up: Replicas that end before.
        coming: What is to be taken, each checkpoint once.
    """
    if not node.pool.total_bytes:
        return True
    wanted: dict[Checkpoint, int] = {}
    window_bytes = copied_bytes = 0
    for model in coming:
        if streams_on(model, node):  # whoever comes late to a window gets one of its own
            window_bytes += pool_bytes_on(model, node)
            copied_bytes += copy_bytes_on(model, node)
        elif not node.held.get(model.checkpoint, NOTHING_HELD).leases:
            wanted[model.checkpoint] = model.file_bytes
    if copied_bytes and not host_has_room(situation, node, given_up, copied_bytes):
        return False
    if not wanted and not window_bytes:
        return True
    free_bytes = node.pool.total_bytes - node.pool.leased_bytes - sum(wanted.values()) - window_bytes
    for checkpoint, byte_count in situation.index.summaries[node.node_id].coming:
        if checkpoint not in wanted:  # two replicas of one checkpoint share its place
            free_bytes -= byte_count
    return free_bytes >= 0 or free_bytes + _freed_pool_bytes(situation, node, given_up) >= 0


def host_has_room(
    situation: Situation, node: Node, given_up: tuple[Reservation, ...], copied_bytes: int
) -> bool:
    """Tell whether the host has memory for so many bytes beside its pool and the copies of other replicas."""
    total_bytes = host_bytes(node.devices)
    if not total_bytes:
        return True
    models, gone = situation.view.models, {reservation.replica_id for reservation in given_up}
    taken_bytes = sum(
        copy_bytes_on(models[found.reservation.model], node)
        for found in on_node(situation, node)
        if found.reservation.replica_id not in gone and found.reservation.model in models
    )
    return node.pool.total_bytes + taken_bytes + copied_bytes <= total_bytes


def enough(situation: Situation, node: Node, given_up: tuple[Reservation, ...]) -> bool:
    """Tell whether slots and pool suffice, once `given_up` are gone."""
    wanted, summary = situation.wanted, situation.index.summaries[node.node_id]
    return len(free_slots(wanted, summary, given_up)) >= wanted.slots and pool_has_room(
        situation, node, given_up, (wanted.model,)
    )


def on_node(situation: Situation, node: Node) -> tuple[Member, ...]:
    """Return the reserved replicas of a node, by id."""
    found = reservations_on(situation.view, situation.index, node.node_id)
    return tuple(member(situation.view, reservation) for reservation in found)


def rooms_being_made(situation: Situation, node: Node) -> int:
    """Return for how many replicas of this model those on their way out of a node will leave room.

    For a model of several devices that is one at most: they leave room together with slots that are free.
    """
    leaving = tuple(
        found.reservation
        for found in on_node(situation, node)
        if (found.standing is Standing.STOPPING or found.reservation.moving_to is not None)
        and found.reservation.stopping_for in (None, situation.model.name)
        and found.reservation.model in situation.view.models
    )
    if not leaving or enough(situation, node, ()) or not enough(situation, node, leaving):
        return 0
    if situation.wanted.slots > 1:
        return 1
    fitting = situation.wanted.slots_that_fit(situation.index.summaries[node.node_id].shape)
    return sum(slot in fitting for found in leaving for slot in found.devices)


def live_replicas(situation: Situation, name: ModelName) -> int:
    """Return how many replicas of a model are ready or starting, those that move away not counted."""
    return situation.index.tallies.get(name, EMPTY).live


def _freed_pool_bytes(situation: Situation, node: Node, given_up: tuple[Reservation, ...]) -> int:
    leaving: Mapping[Checkpoint, int] = Counter(
        situation.view.models[reservation.model].checkpoint for reservation in given_up
    )
    return sum(
        held.dram_bytes
        for checkpoint, count in leaving.items()
        if (held := node.held.get(checkpoint)) and 0 < held.leases <= count
    )
