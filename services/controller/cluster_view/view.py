"""The cluster as the controller sees it: immutable values, nothing else.

Truth has two sources, and the view keeps them apart. *Reservations* come from the state store: which replica
may occupy which device slots. *Reports* come from node agents: what really runs. `fleet` joins them.

All times are seconds of the controller's monotonic clock, so a view means nothing to another process; what
must outlive a process is in the state store (`records`) or in the next report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from services.controller.cluster_view.demand import Demand, Failure, Refusal
from services.controller.cluster_view.learnt import Arrivals, Fleet, Learnt, MoveCost, Moved, StartStages
from stoker.ids import CheckpointUri, ModelName, NodeId, ReplicaId, Revision

if TYPE_CHECKING:
    from services.controller.cluster_view.index import Index

Checkpoint = tuple[CheckpointUri, Revision]
"""What a store knows the weights of a model by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A deployed model: what decisions need of it.

    Attributes:
        name: What clients ask for.
        checkpoint_uri: Where its checkpoint comes from.
        revision: What exactly the checkpoint's bytes are.
        architecture: Class an engine must know, e.g. `LlamaForCausalLM`.
        file_bytes: What a load reads, and what it occupies in a store's pool that can hold it (`streaming`).
        weight_bytes: What it occupies on a device, without its cache.
        kv_cache_bytes: What its cache adds on a device; 0 = the engine decides.
        layers: Decoder layers; a seed for estimates.
        runtime: Digest of everything that a running replica cannot change; replicas of another are stale.
        keep_alive_seconds: An unused replica lives this long; negative = for ever.
        min_replicas: Kept even when nobody asks.
        max_replicas: Never more than these.
        concurrency: Sessions per replica before another is wanted.
        devices: Slots of one node that a replica occupies; each holds an equal share of the weights.
        pinned: Its replicas are never stopped or moved for other models.
        required_labels: Only nodes with all of these take it.
        preferred_labels: Of two nodes about equally fast, the one with more of these.
        keep_alive_auto: The keep-alive follows the arrivals; `keep_alive_seconds` is the longest.
        kv_bytes_per_token: What a session's key/value cache grows by; 0 = not known.
        origin: What a node that holds nothing of it reads it from: `disk` (a path) or `remote`.
    """

    name: ModelName
    checkpoint_uri: CheckpointUri
    revision: Revision
    architecture: str
    file_bytes: int
    weight_bytes: int
    runtime: str
    kv_cache_bytes: int = 0
    layers: int = 0
    keep_alive_seconds: float = 300.0
    min_replicas: int = 0
    max_replicas: int = 1
    concurrency: int = 8
    devices: int = 1
    pinned: bool = False
    required_labels: frozenset[tuple[str, str]] = frozenset()
    preferred_labels: frozenset[tuple[str, str]] = frozenset()
    keep_alive_auto: bool = False
    kv_bytes_per_token: int = 0
    origin: str = "disk"

    @property
    def checkpoint(self) -> Checkpoint:
        """What a store knows the weights by."""
        return (self.checkpoint_uri, self.revision)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A slot a replica can occupy; `memory_bytes` 0 = its size is not known."""

    index: int
    kind: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A store's memory pool, in bytes; `total_bytes` 0 = not known.

    `window_bytes` is what a checkpoint that is larger than the pool takes of it; 0 = none can be loaded.
    """

    total_bytes: int = 0
    free_bytes: int = 0
    leased_bytes: int = 0
    window_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a node's store holds of one checkpoint, in bytes by tier."""

    dram_bytes: int = 0
    disk_bytes: int = 0
    leases: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A learnt rate of one stage of a load, and the bytes that wait before it."""

    bytes_per_second: float
    queued_bytes: int = 0


class Phase(Enum):
    """Where a reported replica stands; as `ReplicaState` in the protos."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A replica as its node reports it.

    Attributes:
        replica_id: Its id.
        model: The model it serves.
        phase: Where it stands.
        devices: Slots it occupies.
        sessions: Running and waiting.
        idle_since_seconds: When its last session ended; None while one runs.
        first_seen_seconds: When this controller first heard of it.
        ready_since_seconds: When this controller first saw it ready, kept when it fails later; else None.
        loaded_fraction: Of its weights, while it starts.
        stages: Complete once ready.
        error_code: When failed.
        error_message: When failed.
        max_context_tokens: Longest prompt and answer together.
        max_batch: Sessions it runs at once.
        numerics: Names all that decides the bits of its results; empty before it is ready.
        loading: Ready, but weights are still on their way: its stages are not complete.
        context_tokens: Prompt and output so far, over all running sessions.
        waiting_sessions: Of the sessions, those not in its batch yet.
        waiting_since_seconds: Since when this controller has seen some wait without a break.
        longest_since_seconds: When the wait of the one that has waited longest began, wherever that was, as
            its gateway and agent tell; None = none waits, or nobody tells.
        revision: Of the checkpoint it loads.
        has_served: This controller has seen it compute for a session.
    """

    replica_id: ReplicaId
    model: ModelName
    phase: Phase
    devices: tuple[int, ...] = (0,)
    sessions: int = 0
    idle_since_seconds: float | None = None
    first_seen_seconds: float = 0.0
    ready_since_seconds: float | None = None
    loaded_fraction: float = 0.0
    stages: StartStages = field(default_factory=StartStages)
    error_code: str = ""
    error_message: str = ""
    max_context_tokens: int = 0
    max_batch: int = 0
    numerics: str = ""
    loading: bool = False
    context_tokens: int = 0
    waiting_sessions: int = 0
    waiting_since_seconds: float | None = None
    longest_since_seconds: float | None = None
    revision: Revision | None = None
    has_served: bool = False


class Scheduling(Enum):
    """What an operator wants of a node; as `NodeScheduling` in the protos."""

    OPEN = "open"
    CORDONED = "cordoned"
    DRAINED = "drained"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A host as its agent last reported it.

    Attributes:
        node_id: Its id.
        agent_address: `host:port` of its agent.
        store_address: `host:port` of its store.
        devices: Slots, by index.
        replicas: What runs there.
        held: What its store holds, by checkpoint.
        stages: Learnt rates, by stage name.
        pool: Its store's pool.
        architectures: What its engines serve; empty = it did not say.
        warm_workers: Pre-started ones, without a model.
        worker_start_seconds: Learnt time from spawn to warm; 0 = not known.
        next_worker_seconds: Until the next pre-started one is warm, when it reported; 0 = none is coming.
        draining: Takes no new replicas.
        labels: Set by the operator, on the host.
        learnt: Rates learnt from the starts this controller has seen, by stage name.
        opening: Seconds before the first byte of a checkpoint comes, by far tier; see `lessons`.
        moved: The last moves away from it, oldest first.
        connected: Its report stream stands.
        reachable: It was heard of within the time-out. Replicas of an unreachable node serve nobody.
        last_seen_seconds: When its last report came.
    """

    node_id: NodeId
    agent_address: str = ""
    store_address: str = ""
    devices: tuple[Device, ...] = ()
    replicas: Mapping[ReplicaId, Replica] = field(default_factory=dict)
    held: Mapping[tuple[CheckpointUri, Revision], Held] = field(default_factory=dict)
    stages: Mapping[str, Stage] = field(default_factory=dict)
    pool: Pool = field(default_factory=Pool)
    architectures: frozenset[str] = frozenset()
    warm_workers: int = 0
    worker_start_seconds: float = 0.0
    next_worker_seconds: float = 0.0
    draining: bool = False
    labels: frozenset[tuple[str, str]] = frozenset()
    learnt: Mapping[str, Learnt] = field(default_factory=dict)
    opening: Mapping[str, float] = field(default_factory=dict)
    moved: tuple[Moved, ...] = ()
    connected: bool = True
    reachable: bool = True
    last_seen_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """The right of one replica to occupy device slots of one node.

    Attributes:
        replica_id: Who holds it.
        model: Which model it serves.
        node_id: Where.
        devices: Which slots.
        runtime: The model's runtime when it was placed; another one now = stale.
        predicted_seconds: The estimate that won.
        seen_seconds: When this controller made it or read it from the state.
        adopted: It was read from the state: whoever made it may or may not have sent the order.
        reported: Its node has reported the replica at least once since.
        stopping_since_seconds: When the stop was decided; None = it is wanted.
        stopping_for: The model it makes room for, if any.
        moving_to: The replica its sessions go to, while it is moved away.
        lost: Its node has not reported within the time-out since this controller leads; cleared when it does.
        releasing: Its deletion from the state is under way.
    """

    replica_id: ReplicaId
    model: ModelName
    node_id: NodeId
    devices: tuple[int, ...]
    runtime: str
    predicted_seconds: float = 0.0
    seen_seconds: float = 0.0
    adopted: bool = False
    reported: bool = False
    stopping_since_seconds: float | None = None
    stopping_for: ModelName | None = None
    moving_to: ReplicaId | None = None
    lost: bool = False
    releasing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Everything decisions are made of; changed only by `fold`."""

    models: Mapping[ModelName, Model] = field(default_factory=dict)
    nodes: Mapping[NodeId, Node] = field(default_factory=dict)
    reservations: Mapping[ReplicaId, Reservation] = field(default_factory=dict)
    demands: Mapping[ModelName, Demand] = field(default_factory=dict)
    failures: Mapping[ModelName, Failure] = field(default_factory=dict)
    refusals: Mapping[ModelName, Refusal] = field(default_factory=dict)
    measured: Mapping[ModelName, tuple[StartStages, ...]] = field(default_factory=dict)
    """The last starts of each model, oldest first; what its next estimate learns from."""
    distrusted: frozenset[ReplicaId] = frozenset()
    """Replicas a gateway found broken, until their node reports again."""
    always: frozenset[ModelName] = frozenset()
    """Models with `min_replicas` above 0: wanted though nobody asks."""
    scheduling: Mapping[NodeId, Scheduling] = field(default_factory=dict)
    """What operators want of nodes; nodes not in it are open."""
    moves: Mapping[tuple[ModelName, str], MoveCost] = field(default_factory=dict)
    """Learnt costs of moving a session, by model and path."""
    arrivals: Mapping[ModelName, Arrivals] = field(default_factory=dict)
    """When models were asked for."""
    fleet: Fleet = field(default_factory=Fleet)
    """What is known of nodes and models that have not shown it themselves."""
    room: int = 0
    """Grows whenever an event may have made room for a model that waits; see `gain`."""
    room_settled: int = 0
    """Of `room`, what all models that wait have been placed again for."""
    index: Index | None = field(default=None, compare=False, repr=False)
    """Summaries of the above that `fold` keeps current; None = not made yet. Never a source of truth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Every constant a decision uses.

    Attributes:
        node_timeout_seconds: A node not heard of for this long is unreachable.
        node_forget_seconds: After this long its reservations are released.
        order_grace_seconds: A replica ordered but never reported is given up after this.
        orphan_grace_seconds: A replica nobody reserved is stopped after this.
        minimum_residency_seconds: A ready replica is not disturbed sooner: who waited for it has yet to come.
        residency_ends_served: Nor is this waited for once it has served somebody and is idle.
        replace_after_seconds: A stale replica that never falls idle is drained after this.
        drain_grace_seconds: Given to running sessions when a replica must go.
        stop_seconds: Estimate for stopping an idle replica until its slot is free.
        tie_seconds: Estimates this close are a tie; the smaller disturbance wins.
        start_attempts: Starts in a row that processes may die under before those who wait are told; ≥ 1.
        backoff_first_seconds: After the first failed start; doubles with each further one.
        backoff_limit_seconds: Never longer than this.
        may_migrate: Running replicas may be moved to make room.
        hysteresis_ratio: A running or idle replica is disturbed only when that gains this many times what it
            costs (SHEPHERD's lambda, NSDI '23).
        waiting_bound_seconds: Who waits for longer than this is not held back by hysteresis any more.
        rooms_at_once: Of one model that lacks several replicas, room is made for so many at a time; ≥ 1.
        queue_age_seconds: Sessions that wait for a place in a batch for this long want one more replica.
        migration_candidates: Nodes looked at for a move, the most promising first.
        move_seconds_per_token: Until a model's moves are measured.
        move_seconds: Likewise, per move.
    """

    node_timeout_seconds: float = 5.0
    node_forget_seconds: float = 60.0
    order_grace_seconds: float = 10.0
    orphan_grace_seconds: float = 5.0
    minimum_residency_seconds: float = 2.0
    residency_ends_served: bool = True
    replace_after_seconds: float = 30.0
    drain_grace_seconds: float = 30.0
    stop_seconds: float = 0.2
    tie_seconds: float = 0.01
    start_attempts: int = 4
    backoff_first_seconds: float = 1.0
    backoff_limit_seconds: float = 60.0
    may_migrate: bool = False
    hysteresis_ratio: float = 1.0
    waiting_bound_seconds: float = 120.0
    rooms_at_once: int = 16
    queue_age_seconds: float = 5.0
    migration_candidates: int = 8
    move_seconds_per_token: float = 0.0005
    move_seconds: float = 0.2
