"""What an operator can set: `STOKER_CONTROLLER_*`, or a TOML file."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.controller.cluster_view.view import Policy
from services.controller.scaling.foresight import Limits
from services.controller.scaling.rebalancing import RebalanceLimits
from stoker.settings import ServiceSettings
from stoker.units import GB, MB


class ControllerSettings(ServiceSettings):
    """Settings of a controller."""

    model_config = SettingsConfigDict(env_prefix="STOKER_CONTROLLER_")

    address: str = "127.0.0.1:7070"
    """`host:port` to listen on."""

    advertised_address: str = ""
    """`host:port` others reach this controller by; empty = `address`."""

    state: str = Field(min_length=1)
    """Where the cluster's state is kept: `embedded:///absolute/path/state.db`, `embedded://:memory:` or
    `etcd://host:port,host:port/prefix`."""

    leader_ttl_seconds: float = Field(default=5.0, ge=1.0)
    """How long a dead leader's lease lasts, in seconds; another controller takes over after it."""

    keep_alive_seconds: float = 300.0
    """Default of a model's keep-alive, in seconds; negative = for ever."""

    max_replicas: int = Field(default=1, ge=1)
    """Default of a model's largest number of replicas."""

    concurrency: int = Field(default=8, ge=1)
    """Default of a model's sessions per replica before another replica is wanted."""

    max_queue: int = Field(default=128, ge=1)
    """Default of the requests that may wait for a model in one gateway."""

    acquire_timeout_seconds: float = Field(default=300.0, gt=0)
    """How long a request may wait for a replica, in seconds: the default and the most."""

    max_waiters: int = Field(default=10_000, ge=1)
    """Requests that may wait for replicas at once, over all models; further ones are refused."""

    max_models: int = Field(default=10_000, ge=1)
    """Models that may be deployed."""

    routes_heartbeat_seconds: float = Field(default=2.0, gt=0)
    """How often a silent route stream says that the controller is there, in seconds."""

    order_timeout_seconds: float = Field(default=5.0, gt=0)
    """How long a node agent may take to accept an order, in seconds."""

    describe_timeout_seconds: float = Field(default=60.0, gt=0)
    """How long a store may take to read a checkpoint's headers, in seconds."""

    node_timeout_seconds: float = Field(default=5.0, gt=0)
    """A node not heard of for this long is unreachable; its replicas leave the routes."""

    node_forget_seconds: float = Field(default=60.0, gt=0)
    """A node not heard of for this long is forgotten; its reservations are released."""

    settling_seconds: float = Field(default=1.0, ge=0)
    """A new leader stops and moves nothing for other models for so many seconds, while nodes report to it."""

    orphan_grace_seconds: float = Field(default=5.0, ge=0)
    """A replica that nobody reserved is stopped after this many seconds."""

    minimum_residency_seconds: float = Field(default=2.0, ge=0)
    """A ready replica is not stopped for being idle before this many seconds have passed."""

    drain_grace_seconds: float = Field(default=30.0, ge=0)
    """What running sessions get, in seconds, when their replica must go."""

    replace_after_seconds: float = Field(default=30.0, ge=0)
    """A replica of an older deployment that never falls idle is drained after this many seconds."""

    hysteresis_ratio: float = Field(default=1.0, ge=1.0)
    """Others' replicas are stopped or moved only where that gains this many times what it costs them."""

    may_migrate: bool = True
    """Replicas that serve sessions may be moved to another node to make room for a model whose start is much
    faster where they are; their streams go on without a gap."""

    waiting_bound_seconds: float = Field(default=120.0, gt=0)
    """Who waits for longer gets room even from replicas that serve sessions, in seconds; these are drained,
    which costs their sessions a move or `drain_grace_seconds`. Below `acquire_timeout_seconds` it keeps a
    model from starving; far below, two models with traffic take room from each other all the time."""

    queue_age_seconds: float = Field(default=5.0, ge=0)
    """Sessions that wait in a replica for this many seconds want one more replica."""

    rebalance: bool = True
    """Running streams move also when no start asks for it: from a replica with more sessions than the model's
    `concurrency` to one with room, and to make a node fit for a model that finds none; false = they stay."""

    rebalance_look_seconds: float = Field(default=1.0, gt=0)
    """How often that is looked at, in seconds."""

    rebalance_crowded_seconds: float = Field(default=2.0, ge=0)
    """A replica must have had too many sessions for this many seconds before some are moved."""

    rebalance_hysteresis_ratio: float = Field(default=2.0, ge=1.0)
    """Streams are moved for this reason only where that gains this many times what it costs them."""

    rebalance_sessions_per_node: int = Field(default=4, ge=0)
    """Sessions moved from or to one node at a time; 0 = none."""

    rebalance_rest_seconds: float = Field(default=60.0, ge=0)
    """What has taken sessions gives none, and what has given some takes none, for this many seconds."""

    forecast_look_seconds: float = Field(default=5.0, gt=0)
    """How often forecasts are looked at, in seconds."""

    prefetch_memory_fraction: float = Field(default=0.5, ge=0, le=1)
    """Of a node's pool, what checkpoints that nobody uses may fill by prefetching; 0 = no prefetches."""

    prefetch_fill_fraction: float = Field(default=0.9, ge=0, le=1)
    """Of a node's pool, what may be filled from its disk with checkpoints that nobody asked for yet, where
    devices have memory of their own; 0 = nothing."""

    prefetch_horizon_seconds: float = Field(default=300.0, gt=0)
    """A model likely to be asked for within this many seconds is worth having in a node's memory."""

    prefetch_timeout_seconds: float = Field(default=600.0, gt=0)
    """How long a store may take for one prefetch, in seconds."""

    prestart_memory_bytes: int = Field(default=4 * GB, ge=0)
    """Memory of each node, in bytes, that forecasts may fill with pre-started workers; an agent's own
    `max_prestarted_workers` bounds them, too. 0 = agents do as they are configured."""

    worker_memory_bytes: int = Field(default=600 * MB, gt=0)
    """What one pre-started worker is counted as, in bytes."""

    start_attempts: int = Field(default=4, ge=1)
    """Starts of a model in a row under which a worker or a store may die before waiting requests are told."""

    backoff_first_seconds: float = Field(default=1.0, gt=0)
    """Rest after a model's first failed start, in seconds; doubles with each further one."""

    backoff_limit_seconds: float = Field(default=60.0, gt=0)
    """The longest such rest, in seconds."""

    @property
    def public_address(self) -> str:
        """The address others reach this controller by."""
        return self.advertised_address or self.address

    def limits(self) -> Limits:
        """Return what forecasts may do."""
        return Limits(
            memory_fraction=self.prefetch_memory_fraction,
            fill_fraction=self.prefetch_fill_fraction,
            worker_memory_bytes=self.prestart_memory_bytes,
            bytes_per_worker=self.worker_memory_bytes,
            horizon_seconds=self.prefetch_horizon_seconds,
        )

    def rebalance_limits(self) -> RebalanceLimits:
        """Return what rebalancing may do."""
        return RebalanceLimits(
            crowded_seconds=self.rebalance_crowded_seconds,
            hysteresis_ratio=self.rebalance_hysteresis_ratio,
            sessions_per_node=self.rebalance_sessions_per_node,
            rest_seconds=self.rebalance_rest_seconds,
            horizon_seconds=self.prefetch_horizon_seconds,
        )

    def policy(self) -> Policy:
        """Return the constants of decisions."""
        return Policy(
            node_timeout_seconds=self.node_timeout_seconds,
            node_forget_seconds=self.node_forget_seconds,
            orphan_grace_seconds=self.orphan_grace_seconds,
            minimum_residency_seconds=self.minimum_residency_seconds,
            drain_grace_seconds=self.drain_grace_seconds,
            replace_after_seconds=self.replace_after_seconds,
            hysteresis_ratio=self.hysteresis_ratio,
            may_migrate=self.may_migrate,
            waiting_bound_seconds=self.waiting_bound_seconds,
            queue_age_seconds=self.queue_age_seconds,
            start_attempts=self.start_attempts,
            backoff_first_seconds=self.backoff_first_seconds,
            backoff_limit_seconds=self.backoff_limit_seconds,
        )
