"""What a decision needs to know of one node before it looks closer, computed once per change. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from operator import attrgetter, is_

from services.controller.cluster_view.estimate import (
    bytes_per_second,
    opening_seconds,
    worker_wait_seconds,
)
from services.controller.cluster_view.frozen import amender_of, changed
from services.controller.cluster_view.ladder import item_added, item_removed
from services.controller.cluster_view.streaming import has_own_memory
from services.controller.cluster_view.traits import Trait, trait_holds, trait_of, with_load
from services.controller.cluster_view.view import (
    Checkpoint,
    Device,
    Held,
    Node,
    Reservation,
    Scheduling,
    View,
)
from stoker.ids import ModelName, NodeId, ReplicaId

ORIGINS = ("disk", "peer", "remote")
"""Tiers that the bytes of a checkpoint come from where a node's memory lacks them."""


class Shape:
    """What a node can ever take: architectures, devices, the pool's bytes. Hashed once: it is a key.

    Attributes:
        architectures: What its engines serve; empty = it did not say.
        devices: Its slots.
        pool_bytes: Of its store's pool; 0 = not known.
        window_bytes: Of a window of it, for checkpoints that are larger; 0 = there is none.
    """

    __slots__ = ("_hash", "architectures", "devices", "pool_bytes", "window_bytes")

    def __init__(
        self, architectures: frozenset[str], devices: tuple[Device, ...], pool_bytes: int, window_bytes: int
    ) -> None:
        self.architectures = architectures
        self.devices = devices
        self.pool_bytes = pool_bytes
        self.window_bytes = window_bytes
        self._hash = hash((architectures, devices, pool_bytes, window_bytes))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Shape)
            and self._hash == other._hash
            and self.pool_bytes == other.pool_bytes
            and self.window_bytes == other.window_bytes
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
        occupied: Slots of replicas that run there.
        stages_queue: Bytes wait before some stage, as its store says.
        traits: Of its reservations, by replica id.
        is_open: It takes new replicas.
        free: Slots that nobody occupies or has reserved, sorted.
        loading_bytes: What starts under way there still read, each checkpoint once.
        loading: The checkpoints that those are of; who starts another replica of one reads nothing more.
        starting_workers: Warm workers that starts under way may take first.
        worker_seconds: Until a worker would take an order for one device; 0 = one waits.
        queued: Bytes wait before some stage, so that loads take longer than `rates` say.
        worth_keys: Of each idle replica that may go, what it is worth (`traits`), the cheapest to lose first.
        busy: Replicas that serve sessions now and may be moved, or drained; by id.
        busy_tokens: The fewest that the sessions of one of them have together; 0 = there is none.
        busy_bytes: The fewest that a start of one of them copies to each device; 0 = there is none.
        settling: When each of the idle and busy ones became ready, if its weights are all there.
        leaving_for: Whom replicas on their way out make room for, `ANYBODY` among them; sorted.
        coming: Checkpoints that replicas just ordered will lease and the store does not show yet, with bytes.
        has_orphans: Replicas run there that nobody reserved.
    """

    shape: Shape
    rates: tuple[float, ...]
    openings: tuple[float, ...]
    device_rate: float
    occupied: frozenset[int] = frozenset()
    stages_queue: bool = False
    traits: tuple[Trait, ...] = field(default=(), compare=False, repr=False)
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


_with_load = amender_of(Summary, "traits", "worth_keys", "busy", "busy_tokens", "busy_bytes")
_with_tokens = amender_of(Summary, "busy_tokens")


def is_open(view: View, node: Node) -> bool:
    """Tell whether replicas may be placed on the node now."""
    scheduling = view.scheduling.get(node.node_id, Scheduling.OPEN)
    return node.connected and node.reachable and not node.draining and scheduling is Scheduling.OPEN


def summary_of(
    view: View,
    node_id: NodeId,
    reservations: tuple[Reservation, ...],
    known: Summary | None = None,
    was: Node | None = None,
) -> Summary:
    """Return the summary of a node with its reservations.

    Args:
        view: The cluster.
        node_id: Which node.
        reservations: All of those on it, by replica id.
        known: An earlier summary of `was` and the very same models, while the same replicas were distrusted:
            spares most of the work.
        was: What the node was then.
    """
    node = view.nodes[node_id]
    if known is None or was is None:
        known = _of_report(node)
        traits = tuple([trait_of(view, node, reservation) for reservation in reservations])
    else:
        traits = _traits(view, node, reservations, known, was)
        if was is not node and not only_replicas_differ(was, node):
            known = _of_later_report(node, known) if _same_but_for_queues(was, node) else _of_report(node)
    return _summed(view, node, known, traits)


def _summed(view: View, node: Node, known: Summary, traits: tuple[Trait, ...]) -> Summary:
    """Return a summary with these traits summed up: in one pass, for every event about a node makes one."""
    taken, reserved = set(known.occupied), set()
    worth_keys, busy, busy_bytes, settling = [], [], [], []
    loading: dict[Checkpoint, int] = {}
    leaving_for, coming, starting_workers = set(), set(), 0
    for reservation, takes_workers, worth_key, start_bytes, _, settled_at, whom, reads, leases, _ in traits:
        taken.update(reservation.devices)
        reserved.add(reservation.replica_id)
        starting_workers += takes_workers
        if worth_key is not None:
            worth_keys.append(worth_key)
        if start_bytes is not None:
            busy.append(reservation.replica_id)
            busy_bytes.append(start_bytes)
        if settled_at is not None:
            settling.append(settled_at)
        if whom is not None:
            leaving_for.add(whom)
        if reads is not None:
            loading[reads[0]] = reads[1]
        if leases is not None:
            coming.add(leases)
    loading_bytes = sum(loading.values())
    return changed(
        known,
        traits=traits,
        is_open=is_open(view, node),
        free=tuple([device.index for device in node.devices if device.index not in taken]),
        loading_bytes=loading_bytes,
        loading=frozenset(loading),
        starting_workers=starting_workers,
        worker_seconds=worker_wait_seconds(node, starting_workers),
        queued=known.stages_queue or loading_bytes > 0,
        worth_keys=tuple(sorted(worth_keys)),
        busy=tuple(busy),
        busy_tokens=_fewest_tokens(node, tuple(busy)),
        busy_bytes=min(busy_bytes, default=0),
        settling=tuple(settling),
        leaving_for=tuple(sorted(leaving_for)),
        coming=tuple(sorted(coming)),
        has_orphans=any(each not in view.reservations for each in node.replicas.keys() - reserved),
    )


def summary_with_load(view: View, node: Node, known: Summary, loaded: Iterable[Reservation]) -> Summary:
    """Return the summary of a node after nothing but the sessions of these replicas have changed.

    Args:
        view: The cluster.
        node: As it is now.
        known: Its summary before.
        loaded: Of its reservations, those whose replica's sessions are others, not only longer contexts.
    """
    traits, worth_keys, busy = known.traits, known.worth_keys, known.busy
    for reservation in loaded:
        at = _place_of(traits, reservation)
        was = traits[at]
        now = with_load(view, node, was)
        if now is was:
            continue
        traits = (*traits[:at], now, *traits[at + 1 :])
        if was.worth_key is not None:
            worth_keys = item_removed(worth_keys, was.worth_key)
        if now.worth_key is not None:
            worth_keys = item_added(worth_keys, now.worth_key)
        if was.busy is not None:
            busy = item_removed(busy, reservation.replica_id)
        if now.busy is not None:
            busy = item_added(busy, reservation.replica_id)
    if traits is known.traits:
        busy_tokens = _fewest_tokens(node, busy)
        return known if busy_tokens == known.busy_tokens else _with_tokens(known, busy_tokens)
    busy_bytes = known.busy_bytes if busy is known.busy else _fewest_bytes(traits)
    return _with_load(known, traits, worth_keys, busy, _fewest_tokens(node, busy), busy_bytes)


def _place_of(traits: tuple[Trait, ...], reservation: Reservation) -> int:
    """Return where the trait of a reservation is; by identity, for equality would compare whole traits."""
    for at, trait in enumerate(traits):
        if trait.reservation is reservation:
            return at
    raise AssertionError(f"{reservation.replica_id} has no trait on its node {reservation.node_id}")


def _fewest_bytes(traits: tuple[Trait, ...]) -> int:
    """Return the fewest bytes that a start of a busy one copies to each device; 0 = there is none."""
    return min([trait.busy for trait in traits if trait.busy is not None], default=0)


def _fewest_tokens(node: Node, busy: tuple[ReplicaId, ...]) -> int:
    """Return the fewest tokens that one of these replicas' sessions have together; 0 = there is none."""
    replicas = node.replicas
    return min([replicas[replica_id].context_tokens for replica_id in busy], default=0)


def _traits(
    view: View, node: Node, reservations: tuple[Reservation, ...], known: Summary, was: Node
) -> tuple[Trait, ...]:
    """Return the traits of a node's reservations; those already known of what did not change."""
    before = {id(trait.reservation): trait for trait in known.traits}  # kept alive by their traits
    if was is not node:
        holds = trait_holds(was, node, view.models)
        for trait in known.traits:
            if not holds(trait):
                del before[id(trait.reservation)]
    return tuple(
        [before.get(id(reservation)) or trait_of(view, node, reservation) for reservation in reservations]
    )


_REST = attrgetter(
    *(each.name for each in fields(Node) if each.name not in {"replicas", "last_seen_seconds"})
)
"""Of a node, all but its replicas and when they were seen."""


def only_replicas_differ(was: Node, now: Node) -> bool:
    """Tell whether what `_of_report` reads of two nodes is the same object; False: it may be equal."""
    return (
        all(map(is_, _REST(was), _REST(now)))
        and was.replicas.keys() == now.replicas.keys()
        and all(was.replicas[each].devices is replica.devices for each, replica in now.replicas.items())
    )


def _of_report(node: Node) -> Summary:
    """Return what a node's report alone says; the rest empty."""
    device_rate, rates = _rates(node)
    return Summary(
        shape=_shape_of(node.architectures, node.devices, node.pool.total_bytes, node.pool.window_bytes),
        rates=rates,
        openings=tuple(opening_seconds(node, origin) for origin in ORIGINS),
        device_rate=device_rate,
        occupied=_occupied(node),
        stages_queue=_stages_queue(node),
    )


def _of_later_report(node: Node, known: Summary) -> Summary:
    """Return the same, given a summary of the node when it was `_same_but_for_queues`."""
    return changed(known, occupied=_occupied(node), stages_queue=_stages_queue(node))


def _same_but_for_queues(was: Node, now: Node) -> bool:
    """Tell whether of what `_of_report` reads only the queues and the replicas' slots may differ."""
    return (
        _paced_by(was) == _paced_by(now)
        and was.pool.total_bytes == now.pool.total_bytes
        and was.pool.window_bytes == now.pool.window_bytes
        and was.stages.keys() == now.stages.keys()
        and all(
            stage is now.stages[name] or stage.bytes_per_second == now.stages[name].bytes_per_second
            for name, stage in was.stages.items()
        )
    )


_paced_by = attrgetter("architectures", "devices", "learnt", "opening")


def _occupied(node: Node) -> frozenset[int]:
    return frozenset([device for replica in node.replicas.values() for device in replica.devices])


def _stages_queue(node: Node) -> bool:
    return any(stage.queued_bytes for name, stage in node.stages.items() if name in _STAGES)


_STAGES = frozenset((*ORIGINS, "device"))


def _rates(node: Node) -> tuple[float, tuple[float, ...]]:
    device_rate = bytes_per_second(node, "device") if has_own_memory(node) else math.inf
    return device_rate, tuple(min(bytes_per_second(node, origin), device_rate) for origin in ORIGINS)


def holds_all(view_held: Held | None, file_bytes: int) -> bool:
    """Tell whether a store can give all of a checkpoint to a peer."""
    return view_held is not None and max(view_held.dram_bytes, view_held.disk_bytes) >= file_bytes
