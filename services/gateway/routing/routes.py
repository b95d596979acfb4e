"""Routes: which models there are and which replicas are ready, as the controller last said. Pure.

The table keeps what it knows while no controller can be reached: warm requests go on without one.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from stoker.errors import ModelNotFound, PeerError
from stoker.ids import ModelName, ReplicaId
from stoker.v1 import controller_pb2, model_pb2, session_pb2

ADAPTER_MARK = ":"
"""Between a model's name, which has none, and an adapter's."""
MAX_NEAR_NAMES = 3
UNSYNCED_RETRY_SECONDS = 2.0
SHUN_SECONDS = 2.0
"""How long a replica that failed is passed over, unless the controller names it anew meanwhile."""
RESUME_MODES = {"exact": session_pb2.RESUME_MODE_EXACT, "fast": session_pb2.RESUME_MODE_FAST}


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A place where a model is ready."""

    replica_id: ReplicaId
    node_id: str
    agent_address: str
    max_context_tokens: int
    """0 = not known."""
    max_batch: int
    numerics: str = ""
    """Names all that decides the bits of its answers; empty = not known."""
    revision: str = ""
    """Of the checkpoint it serves; empty = not known."""

    def continues(self, other: Replica) -> bool:
        """Say whether this replica has the other's weights; an unknown revision counts as equal."""
        return not self.revision or not other.revision or self.revision == other.revision

    def computes_like(self, other: Replica) -> bool:
        """Say whether its results equal the other's to the bit; an unknown numerics line counts as equal."""
        return not self.numerics or not other.numerics or self.numerics == other.numerics

    @classmethod
    def from_proto(cls, replica: controller_pb2.RouteReplica) -> Replica:
        """Return the value of a route's replica."""
        return cls(
            replica_id=ReplicaId(replica.replica_id),
            node_id=replica.node_id,
            agent_address=replica.agent_address,
            max_context_tokens=replica.max_context_tokens,
            max_batch=replica.max_batch,
            numerics=replica.numerics,
            revision=replica.revision,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRoute:
    """A deployed model and where it is ready."""

    name: ModelName
    created_unix_seconds: float
    checkpoint_uri: str
    revision: str
    context_tokens: int
    """Prompt and answer together; 0 = not known before a replica is ready."""
    vocabulary_tokens: int
    """0 = not known."""
    max_queue: int
    replicas: tuple[Replica, ...]
    store_addresses: tuple[str, ...]
    resume_mode: session_pb2.ResumeMode.ValueType = session_pb2.RESUME_MODE_EXACT
    """How a session's tokens get into its next replica."""
    adapters: Mapping[str, model_pb2.AdapterSpec] = field(default_factory=dict)
    """By name, sorted; clients ask for `model:adapter`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return all that clients may ask for: the model as it is, then with each adapter."""
        return self.name, *(f"{self.name}{ADAPTER_MARK}{adapter}" for adapter in self.adapters)

    @property
    def batch_capacity(self) -> int:
        """Return how many sessions its ready replicas decode at once."""
        return sum(max(1, replica.max_batch) for replica in self.replicas)

    @classmethod
    def from_proto(cls, route: controller_pb2.Route) -> ModelRoute:
        """Return the value of a controller's route."""
        spec, checkpoint = route.model.spec, route.model.checkpoint
        limits = [limit for limit in (spec.max_context_tokens, checkpoint.context_tokens) if limit]
        return cls(
            name=ModelName(spec.name),
            created_unix_seconds=route.model.created_unix_seconds,
            checkpoint_uri=checkpoint.uri or spec.checkpoint_uri,
            revision=checkpoint.revision,
            context_tokens=min(limits, default=0),
            vocabulary_tokens=checkpoint.vocabulary_tokens,
            max_queue=max(1, spec.max_queue),
            resume_mode=RESUME_MODES.get(spec.resume, session_pb2.RESUME_MODE_EXACT),
            replicas=tuple(Replica.from_proto(replica) for replica in route.replicas),
            store_addresses=tuple(route.store_addresses),
            adapters={adapter.name: adapter for adapter in sorted(spec.adapters, key=lambda one: one.name)},
        )


class RouteTable:
    """All routes.

    Attributes:
        synced: A controller has told them at least once.
    """

    def __init__(self) -> None:
        self.synced = False
        self._routes: dict[ModelName, ModelRoute] = {}
        self._arriving: dict[ModelName, ModelRoute] | None = None
        self._shunned: dict[ReplicaId, float] = {}

    def apply(self, update: controller_pb2.RoutesUpdate) -> None:
        """Take a message of the controller's route stream."""
        if update.heartbeat:
            return
        if update.snapshot:
            self._arriving = {}
        routes = self._routes if self._arriving is None else self._arriving
        for message in update.routes:
            route = ModelRoute.from_proto(message)
            if message.deleted:
                routes.pop(route.name, None)
            else:
                routes[route.name] = route
                for replica in route.replicas:
                    self._shunned.pop(replica.replica_id, None)
        if self._arriving is not None and not update.more:  # a snapshot counts once it is whole
            self._routes, self._arriving, self._shunned = self._arriving, None, {}
            self.synced = True

    def models(self) -> tuple[ModelRoute, ...]:
        """Return all routes, by name."""
        return tuple(self._routes[name] for name in sorted(self._routes))

    def __contains__(self, name: str) -> bool:
        """Say whether `model` or `model:adapter` is deployed, as far as this table knows."""
        return self._get(name) is not None

    def find(self, name: str) -> ModelRoute:
        """Return the route of `model` or `model:adapter`.

        Raises:
            ModelNotFound: No model of that name, or no such adapter; the message suggests near names.
            PeerError: No controller has told any route yet.
        """
        route = self._get(name)
        if route is not None:
            return route
        if not self.synced:
            raise PeerError(
                "this gateway has not heard from a controller yet, so it knows no model; try again shortly",
                retry_after_seconds=UNSYNCED_RETRY_SECONDS,
            )
        names = [known for route in self._routes.values() for known in route.names]
        raise ModelNotFound(_not_found(name, names), param="model")

    def _get(self, name: str) -> ModelRoute | None:
        model, adapter = split_name(name)
        route = self._routes.get(model)
        return route if route is not None and (adapter is None or adapter in route.adapters) else None

    def shun(self, replica_id: ReplicaId, *, now_seconds: float) -> None:
        """Pass over a replica that failed, for `SHUN_SECONDS`."""
        self._shunned = {known: until for known, until in self._shunned.items() if until > now_seconds}
        self._shunned[replica_id] = now_seconds + SHUN_SECONDS

    def shunned(self, *, now_seconds: float) -> frozenset[ReplicaId]:
        """Return the replicas to pass over now."""
        if not self._shunned:
            return frozenset()
        return frozenset(known for known, until in self._shunned.items() if until > now_seconds)


def split_name(name: str) -> tuple[ModelName, str | None]:
    """Return the model and the adapter, if any, of what a client asks for."""
    model, mark, adapter = name.partition(ADAPTER_MARK)
    return ModelName(model), adapter if mark else None


def choose_replica(
    replicas: Iterable[Replica],
    in_flight: Mapping[ReplicaId, int],
    *,
    excluded: Collection[ReplicaId] = (),
    like: Replica | None = None,
) -> Replica | None:
    """Return the replica with the most room, by this gateway's own sessions; None when there is none.

    Those of equal numerics come first, then room: sessions per batch slot; the first one named wins a tie.

    Args:
        replicas: Ready ones.
        in_flight: Sessions this gateway has running on each; absent = 0.
        excluded: Replicas that just failed.
        like: Where the session began: only replicas of the same weights can go on with it.
    """
    ready = [
        replica
        for replica in replicas
        if replica.replica_id not in excluded and (like is None or replica.continues(like))
    ]
    return min(
        ready,
        key=lambda replica: (
            like is not None and replica.numerics != like.numerics,
            in_flight.get(replica.replica_id, 0) / max(1, replica.max_batch),
        ),
        default=None,
    )


def _not_found(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=MAX_NEAR_NAMES, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(other) for other in near)}?" if near else ""
    return f"The model {name[:200]!r} does not exist: no model of that name is deployed.{hint}"
