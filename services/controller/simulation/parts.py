"""What a simulated cluster is made of: sessions, replicas, hosts with their caches and links, counters."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from services.controller.simulation.flows import Link
from services.controller.simulation.hardware import ModelSpec, NodeSpec
from services.controller.simulation.loads import Load
from services.controller.simulation.workload import Request
from stoker.ids import ModelName, NodeId, ReplicaId


class Phase(Enum):
    """Where a simulated replica stands."""

    STARTING = "starting"
    READY = "ready"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Session:
    """A request's life: it waits, runs, may be moved or begun again, and ends or is given up."""

    request: Request
    waiting_since_seconds: float
    started_seconds: float | None = None
    first_token_seconds: float | None = None
    ends_seconds: float = 0.0
    replica: SimReplica | None = None
    version: int = 0
    cold: bool = False
    preemptions: int = 0
    migrations: int = 0
    lost: bool = False
    kept_tokens: int = 0
    """Output tokens that it need not generate again, after it was displaced."""
    wait_seconds: float = 0.0
    """All of its waiting that has ended, also after preemptions."""

    @property
    def began_to_wait_seconds(self) -> float:
        """Return when it began to wait, all its waits counted as one."""
        return self.waiting_since_seconds - self.wait_seconds


Running = tuple[float, int, int]
"""Of a session that runs: when it ends, its tokens in and out; each report asks each for how far it is."""


@dataclass(slots=True, eq=False)
class SimReplica:
    """A replica on its devices."""

    replica_id: ReplicaId
    model: ModelSpec
    node: SimNode
    devices: tuple[int, ...]
    began_seconds: float
    tier: str
    token_seconds: float
    """How long one more token takes there."""
    phase: Phase = Phase.STARTING
    sessions: dict[Session, Running] = field(default_factory=dict)
    ready_seconds: float | None = None
    idle_since_seconds: float | None = None
    load: Load | None = None
    predicted_seconds: float | None = None
    """Of its start, by a policy that estimates."""
    moving_to: SimReplica | None = None
    """Its sessions go there once that one is ready."""
    awaits_move: bool = False
    """It is the destination of a move, kept for it."""
    when_ready: Callable[[], None] | None = None

    @property
    def is_idle(self) -> bool:
        """Tell whether it is ready and serves nobody."""
        return self.phase is Phase.READY and not self.sessions and not self.awaits_move

    @property
    def free_places(self) -> int:
        """Return how many more sessions it takes now."""
        if self.phase is not Phase.READY or self.moving_to is not None or self.awaits_move:
            return 0
        return self.model.concurrency - len(self.sessions)


@dataclass(slots=True, eq=False)
class SimNode:
    """A host: its devices' owners, its caches, its links."""

    node_id: NodeId
    spec: NodeSpec
    owners: list[SimReplica | None]
    disk: Link
    network: Link
    bus: tuple[Link, ...]
    dram: OrderedDict[ModelName, int] = field(default_factory=OrderedDict)
    """Checkpoints in memory with their bytes, least recently used first."""
    stored: OrderedDict[ModelName, int] = field(default_factory=OrderedDict)
    """Checkpoints on disk, likewise."""
    holdings: int = 0
    """Grows with every change of what its tiers hold."""
    moved: dict[ModelName, None] = field(default_factory=dict)
    """Checkpoints that came into or left a tier since a policy last asked what the host holds."""
    down: bool = False

    @property
    def replicas(self) -> list[SimReplica]:
        """Return what is on its devices, each once."""
        return list(dict.fromkeys([owner for owner in self.owners if owner is not None]))

    @property
    def free_devices(self) -> tuple[int, ...]:
        """Return the devices nobody has."""
        return () if self.down else tuple(i for i, owner in enumerate(self.owners) if owner is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """Which tiers a policy's loader uses.

    Attributes:
        dram: Checkpoints stay in host memory after use.
        disk: Local disks keep checkpoints.
        preloaded: All checkpoints that fit are on every disk at the start; otherwise a disk is a cache.
    """

    dram: bool = True
    disk: bool = True
    preloaded: bool = True


@dataclass(slots=True)
class Changes:
    """What has changed since the policy last looked; each a set in the order in which it happened."""

    nodes: dict[NodeId, None] = field(default_factory=dict)
    """In more than the sessions of their replicas."""
    replicas: dict[SimReplica, None] = field(default_factory=dict)
    """Sessions began or ended there."""
    queues: dict[ModelName, None] = field(default_factory=dict)
    """Models whose queue, or whose ready replicas, are others."""
    gone: list[SimReplica] = field(default_factory=list)
    """Replicas that have left their devices."""

    def clear(self) -> None:
        """Forget all of it: the policy has looked."""
        self.nodes.clear()
        self.replicas.clear()
        self.queues.clear()
        self.gone.clear()


@dataclass(slots=True)
class Counters:
    """What a run counted."""

    starts: int = 0
    stops: int = 0
    preemptions: int = 0
    displacements: int = 0
    migrations: int = 0
    shifts: int = 0
    """Sessions that moved alone, without their replica."""
    bytes_by_tier: dict[str, int] = field(default_factory=dict)
    busy_device_seconds: float = 0.0
    """Devices that computed for somebody."""
    held_device_seconds: float = 0.0
    """Devices that had an owner."""
    start_errors: list[float] = field(default_factory=list)
    """Of each start that was predicted: |predicted - measured| / measured."""


def node_of(node_id: NodeId, spec: NodeSpec) -> SimNode:
    """Return an empty host."""
    return SimNode(
        node_id=node_id,
        spec=spec,
        owners=[None] * spec.device_count,
        disk=Link(f"{node_id}/disk", spec.disk_bytes_per_second),
        network=Link(f"{node_id}/network", spec.network_bytes_per_second),
        bus=tuple(
            Link(f"{node_id}/bus-{index}", spec.device.bus_bytes_per_second)
            for index in range(spec.device_count)
        ),
    )


def fill(node: SimNode, models: Sequence[ModelSpec]) -> None:
    """Put checkpoints on a disk, beginning at another one on each node, as far as they fit."""
    first = zlib.crc32(node.node_id.encode()) % max(1, len(models))
    left = node.spec.disk_bytes
    for model in (*models[first:], *models[:first]):
        if model.weight_bytes <= left:
            node.stored[model.name] = model.weight_bytes
            left -= model.weight_bytes


def insert(node: SimNode, kept: OrderedDict[ModelName, int], model: ModelSpec, capacity_bytes: int) -> None:
    """Put a checkpoint into one of a host's caches, dropping the least recently used ones for it."""
    if model.name in kept or model.weight_bytes > capacity_bytes:
        return
    left_bytes = capacity_bytes - sum(kept.values())
    while left_bytes < model.weight_bytes:
        dropped, dropped_bytes = kept.popitem(last=False)
        left_bytes += dropped_bytes
        node.moved[dropped] = None
    kept[model.name] = model.weight_bytes
    node.moved[model.name] = None
    node.holdings += 1
