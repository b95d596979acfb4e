"""What a decision needs to know of one node before it looks closer, computed once per change. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from services.controller.estimate import (
    NOTHING,
    bytes_per_second,
    has_own_memory,
    learnt_parts,
    load_seconds,
    opening_seconds,
    worker_wait_seconds,
)
from services.controller.fleet import Member, Standing, is_idle, member
from services.controller.frozen import changed
from services.controller.view import Checkpoint, Device, Held, Node, Reservation, Scheduling, View
from stoker.ids import ModelName, NodeId, ReplicaId

ANYBODY = ModelName("")
"""Whom a replica makes room for that stops for no model in particular."""
ORIGINS = ("disk", "peer", "remote")
"""Tiers that the bytes of a checkpoint come from where a node's memory lacks them."""

WORTH_DECAY_SECONDS = 60.0
"""The chance that an idle replica is asked for again falls by e in this time. An exponential keeps the order
of idle replicas by worth the same as time passes, so that they can be kept sorted (LRFU's trick)."""
WORTH_LOG_LIMIT = 50.0
"""No worth is above e to this: it would be endless."""


class Shape:
    """What a node can ever take: architectures, devices, and the pool's bytes. Hashed once: it is a key.

    Attributes:
        architectures: What its engines serve; empty = it did not say.
        devices: Its slots.
        pool_bytes: Of its store's pool; 0 = not known.
    """

    __slots__ = ("_hash", "architectures", "devices", "pool_bytes")

    def __init__(self, architectures: frozenset[str], devices: tuple[Device, ...], pool_bytes: int) -> None:
        self.architectures = architectures
        self.devices = devices
        self.pool_bytes = pool_bytes
        self._hash = hash((architectures, devices, pool_bytes))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Shape)
            and self._hash == other._hash
            and self.pool_bytes == other.pool_bytes
            and self.architectures == other.architectures
            and self.devices == other.devices
        )


_shape_of = lru_cache(maxsize=4096)(Shape)
"""Equal shapes are one object where this remembers them: cheap to compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A node, as far as the search for the best one needs it.

    Attributes:
        shape: What it can ever take.
        rates: Slowest stage from each of `ORIGINS` to the device, in bytes per second, nothing queued.
        openings: Before the first byte from each of `ORIGINS` comes, in seconds.
        device_rate: To its devices, in bytes per second; infinity where weights are not copied.
        is_open: It takes new replicas.
        free: Slots that nobody occupies or has reserved, sorted.
        loading_bytes: What starts under way there still read, each checkpoint once.
        loading: The checkpoints that those are of; who starts another replica of one reads nothing more.
        starting_workers: Starts that may take a warm worker first.
        worker_seconds: Until a worker would take an order; 0 = one waits.
        queued: Bytes wait before some stage, so that loads take longer than `rates` say.
        worth_keys: Of each idle replica that may go, `worth_key`, the cheapest to lose first.
        busy: Replicas that serve sessions now and may be moved, or drained; by id.
        busy_tokens: The fewest that the sessions of one of them have together; 0 = there is none.
        busy_bytes: The fewest that the checkpoint of one of them has; 0 = there is none.
        settling: When each of the idle and busy ones became ready, if its weights are all there.
        leaving_for: Whom replicas on their way out make room for, `ANYBODY` among them; sorted.
        coming: Checkpoints that replicas just ordered will lease and the store does not show yet, with bytes.
        has_orphans: Replicas run there that nobody reserved.
    """

    shape: Shape
    rates: tuple[float, ...]
    openings: tuple[float, ...]
    device_rate: float
    is_open: bool = False
    free: tuple[int, ...] = ()
    loading_bytes: int = 0
    loading: frozenset[Checkpoint] = frozenset()
    starting_workers: int = 0
    worker_seconds: float = 0.0
    queued: bool = False
    worth_keys: tuple[tuple[float, ReplicaId], ...] = ()
    busy: tuple[ReplicaId, ...] = ()
    busy_tokens: int = 0
    busy_bytes: int = 0
    settling: tuple[float, ...] = ()
    leaving_for: tuple[ModelName, ...] = ()
    coming: tuple[tuple[Checkpoint, int], ...] = ()
    has_orphans: bool = False


def is_open(view: View, node: Node) -> bool:
    """Tell whether replicas may be placed on the node now."""
    scheduling = view.scheduling.get(node.node_id, Scheduling.OPEN)
    return node.connected and node.reachable and not node.draining and scheduling is Scheduling.OPEN


def taken_slots(node: Node, reservations: Iterable[Reservation]) -> set[int]:
    """Return the slots that are reserved, or occupied by something that runs anyway."""
    taken = {device for reservation in reservations for device in reservation.devices}
    taken.update([device for replica in node.replicas.values() for device in replica.devices])
    return taken


def summary_of(
    view: View, node_id: NodeId, reservations: tuple[Reservation, ...], known: Summary | None = None
) -> Summary:
    """Return the summary of a node with its reservations.

    Args:
        view: The cluster.
        node_id: Which node.
        reservations: All of those on it, by replica id.
        known: An earlier summary of the very same report and the same models: spares most of the work.
    """
    node = view.nodes[node_id]
    members = [member(view, reservation) for reservation in reservations]
    ready = [found for found in members if found.standing is Standing.READY]
    others = [found for found in members if found.standing is not Standing.READY]
    taken = taken_slots(node, reservations)
    starting_workers = sum(found.replica is None and found.standing is Standing.STARTING for found in others)
    loading = _loading(view, node, members)
    loading_bytes = sum(loading.values())
    busy = [found for found in ready if is_busy(found) and is_disposable(view, found)]
    leaving = {
        reservation.stopping_for or ANYBODY
        for reservation, _, _, standing, _ in members
        if standing is Standing.STOPPING or reservation.moving_to is not None
    }
    known = known or _of_report(node)
    return changed(
        known,
        is_open=is_open(view, node),
        free=tuple([device.index for device in node.devices if device.index not in taken]),
        loading_bytes=loading_bytes,
        loading=frozenset(loading),
        starting_workers=starting_workers,
        worker_seconds=worker_wait_seconds(node, starting_workers),
        queued=loading_bytes > 0
        or any(node.stages.get(stage, NOTHING).queued_bytes for stage in (*ORIGINS, "device")),
        worth_keys=_worth_keys(view, node, ready, known),
        busy=tuple([found.reservation.replica_id for found in busy]),
        busy_tokens=min([found.replica.context_tokens for found in busy if found.replica], default=0),
        busy_bytes=min([view.models[found.reservation.model].file_bytes for found in busy], default=0),
        settling=tuple(
            [
                found.replica.ready_since_seconds or 0.0
                for found in ready
                if found.replica is not None and not found.replica.loading
            ]
        ),
        leaving_for=tuple(sorted(leaving)),
        coming=tuple(sorted(_coming(view, node, others).items())) if others else (),
        has_orphans=any(replica_id not in view.reservations for replica_id in node.replicas),
    )


def _of_report(node: Node) -> Summary:
    """Return what a node's report alone says; the rest empty."""
    device_rate, rates = _rates(node)
    return Summary(
        shape=_shape_of(node.architectures, node.devices, node.pool.total_bytes),
        rates=rates,
        openings=tuple(opening_seconds(node, origin) for origin in ORIGINS),
        device_rate=device_rate,
    )


def _rates(node: Node) -> tuple[float, tuple[float, ...]]:
    device_rate = bytes_per_second(node, "device") if has_own_memory(node) else math.inf
    return device_rate, tuple(min(bytes_per_second(node, origin), device_rate) for origin in ORIGINS)


def _worth_keys(
    view: View, node: Node, members: list[Member], known: Summary
) -> tuple[tuple[float, ReplicaId], ...]:
    before = {replica_id: key for key, replica_id in known.worth_keys}
    keys = []
    for found in members:
        if is_idle(found) and is_disposable(view, found):
            key = before.get(found.reservation.replica_id)
            keys.append((worth_key(view, node, found) if key is None else key, found.reservation.replica_id))
    return tuple(sorted(keys))


def is_disposable(view: View, found: Member) -> bool:
    """Tell whether the replica's model allows that it makes room for others at all."""
    model = view.models.get(found.reservation.model)
    return model is not None and not model.pinned


def is_busy(found: Member) -> bool:
    """Tell whether the replica serves sessions now, and is not on its way out."""
    replica = found.replica
    return (
        found.standing is Standing.READY
        and replica is not None
        and replica.sessions > 0
        and found.reservation.moving_to is None
    )


def worth_key(view: View, node: Node, found: Member) -> float:
    """Return the logarithm of `worth_seconds` at time 0: what orders idle replicas at any time."""
    model = view.models[found.reservation.model]
    worker_seconds = worker_wait_seconds(node, 0)
    load = load_seconds(model, node, loading_bytes=0, has_peer=True)
    restart = learnt_parts(model, ()).start_seconds(worker_seconds, load)
    idle_since_seconds = found.replica.idle_since_seconds if found.replica else None
    return math.log(max(restart, 0.001)) + (idle_since_seconds or 0.0) / WORTH_DECAY_SECONDS


def worth_seconds(key: float, now_seconds: float) -> float:
    """Return what losing an idle replica is expected to cost: its restart, if it is wanted soon.

    The chance is 1 for a replica that has just fallen idle and falls by e in `WORTH_DECAY_SECONDS`.
    """
    return math.exp(min(key - now_seconds / WORTH_DECAY_SECONDS, WORTH_LOG_LIMIT))


def holds_all(view_held: Held | None, file_bytes: int) -> bool:
    """Tell whether a store can give all of a checkpoint to a peer."""
    return view_held is not None and max(view_held.dram_bytes, view_held.disk_bytes) >= file_bytes


def _coming(view: View, node: Node, members: list[Member]) -> dict[Checkpoint, int]:
    coming: dict[Checkpoint, int] = {}
    for found in members:
        model = view.models.get(found.reservation.model)
        if model is None or found.standing is not Standing.STARTING:
            continue
        held = node.held.get(model.checkpoint)
        if held is None or not held.leases:
            coming[model.checkpoint] = model.file_bytes
    return coming


def _loading(view: View, node: Node, members: list[Member]) -> dict[Checkpoint, int]:
    waiting: dict[Checkpoint, int] = {}
    for found in members:
        replica = found.replica
        if replica is not None and replica.ready_since_seconds is not None:
            continue
        model = view.models.get(found.reservation.model)
        if model is None:
            continue
        held = node.held.get(model.checkpoint, Held())
        if held.dram_bytes < model.file_bytes:
            waiting[model.checkpoint] = model.file_bytes - held.dram_bytes
    return waiting
