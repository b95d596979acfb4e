"""Replicas with a toy engine and a seeded fate: they die, come back, drain, refuse, and speak of the past.

Where a stream has more than one gateway in its life (`schedules`), agents keep its tokens and the leader
changes. These draw from a fate of their own, so that schedules without them stay what they were.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence

from services.gateway.job import Job
from services.gateway.routing.placement import Placement
from services.gateway.routing.routes import Replica, RouteTable
from services.gateway.sessions.waited import Waited
from services.node_agent.sessions.epoch_fence import EpochFence
from stoker.clock import ManualClock
from stoker.errors import (
    Fenced,
    KvUnavailable,
    LoadFailed,
    PeerError,
    QueueFull,
    ReplicaGone,
    StokerError,
    WorkerDied,
)
from stoker.v1 import controller_pb2, model_pb2, node_agent_pb2, session_pb2
from tests.unit.services.gateway.builders import ids_of

LETTERS = ids_of("abcdefghijklmnopqrstuvwxyz")
LENGTH = session_pb2.FINISH_REASON_LENGTH


def toy_token(prompt: Sequence[int], seed: int, log: Sequence[int]) -> int:
    """Return the one token that may follow: it depends on everything before it, as a model's does."""
    mixed = seed
    for token in (*prompt, *log):
        mixed = (mixed * 1_000_003 + token + 1) % (1 << 61)
    return LETTERS[(mixed >> 17) % len(LETTERS)]


class ToyNode:
    """A replica and the tasks that stream from it."""

    def __init__(self) -> None:
        self.is_dead = False
        self.leaves = 0
        self.fence = EpochFence()
        self.owners: dict[str, int] = {}
        self.latest: dict[str, int] = {}
        """Of each session the highest epoch of an owner that ran here: the fence is held against it."""
        self.kept: dict[str, node_agent_pb2.KeptSession] = {}


class ToyCluster:
    """Stands where the gateway's `Agents` does.

    Args:
        seed: Of the faults.
        nodes: How many.
        faults: Probability of one at each event.
        leader_changes: Whether the controller that leads is among what fails.
    """

    def __init__(self, seed: int, *, nodes: int, faults: float, leader_changes: bool = False) -> None:
        self._random = random.Random(seed)
        self.fate = random.Random(-1 - seed)
        self._faults = faults
        self._leader_changes = leader_changes
        self.nodes = {f"rep-{number}": ToyNode() for number in range(nodes)}
        self.history: list[str] = []
        self.breaches: list[str] = []
        """Owners that ran where a later one had been."""
        self.tables: list[RouteTable] = []
        self.streams = 0
        self.away_asks = 0
        self._owner: dict[str, str] = {}

    async def generate(
        self, replica: Replica, order: session_pb2.GenerateRequest, *, timeout_seconds: float
    ) -> AsyncGenerator[session_pb2.GenerateEvent]:
        """Yield a session's events until it ends or fate strikes."""
        node, session_id = self.nodes[replica.replica_id], order.session_id
        if order.follows:
            self._strike_move("begins", order.session_id, replica)
        else:
            self._owner[session_id] = replica.replica_id
        self._admit(node, replica, order)
        self._check_order(node, order)
        self.streams += 1
        node.owners[session_id] = order.epoch
        try:
            number = 0
            async for event in self._events(node, replica, order):
                number += 1
                if order.follows and number <= 2:
                    self._strike_move("has computed" if number == 1 else "is switched", session_id, replica)
                elif order.follows:
                    self._owner[session_id] = replica.replica_id
                yield event
        finally:
            self.streams -= 1
            if node.owners.get(session_id) == order.epoch:
                del node.owners[session_id]

    async def fetch_kv(
        self, destination: Replica, order: node_agent_pb2.FetchKvRequest, *, timeout_seconds: float
    ) -> node_agent_pb2.FetchKvResponse:
        """Ship some tokens more, or fail: what a destination has must never matter to the client."""
        for _ in range(self._random.randrange(4)):
            await asyncio.sleep(0)
        node = self.nodes[destination.replica_id]
        self._strike_move("ships", order.session_id, destination)
        self._strike(node, destination)
        if node.is_dead:
            raise ReplicaGone(f"{destination.replica_id} is dead")
        if self._random.random() < 3 * self._faults:
            raise KvUnavailable("not now")
        tokens = order.from_token + 1 + self._random.randrange(20)
        stands_still = order.hold_seconds and self._random.random() < 0.5  # an older agent's does not
        return node_agent_pb2.FetchKvResponse(tokens=tokens, data_bytes=tokens, held_tokens=int(stands_still))

    async def hold(
        self, replica: Replica, session_id: str, epoch: int, *, seconds: float, timeout_seconds: float
    ) -> int:
        """Fail, or do nothing: a source that goes on too early must never matter to the client."""
        for _ in range(self._random.randrange(3)):
            await asyncio.sleep(0)
        node = self.nodes[replica.replica_id]
        self._strike_move("is held", session_id, replica)
        if node.is_dead:
            raise ReplicaGone(f"{replica.replica_id} is dead")
        if self._random.random() < 3 * self._faults:
            raise KvUnavailable("not now")
        return 0

    async def find_sessions(
        self, address: str, session_ids: Sequence[str], *, timeout_seconds: float
    ) -> Sequence[node_agent_pb2.KeptSession]:
        """Say what a node has kept of a session, unless it is away."""
        await asyncio.sleep(0)
        node = self.nodes[address]
        if node.is_dead or self.fate.random() < 3 * self._faults:
            self._note(f"{address} does not say what it has")
            raise PeerError(f"{address} is away")
        found = []
        for name in session_ids:
            if name in node.kept:
                found.append(node.kept[name])
            elif (highest := node.fence.highest(name)) >= 0:
                found.append(node_agent_pb2.KeptSession(session_id=name, epoch=highest))
        return found

    def release(self, replica: Replica, session_id: str, epoch: int) -> None:
        """Do nothing: that nobody needs a session any more must not matter to its client."""

    def _change_leader(self) -> None:
        """No controller answers for a while; the next one has not heard of every replica at first."""
        self._note("the leader changes")
        self.away_asks = 1 + self.fate.randrange(4)
        heard = [name for name in self.nodes if self.fate.random() < 0.5]
        for table in self.tables:
            table.apply(routes(heard or list(self.nodes)))

    def _admit(self, node: ToyNode, replica: Replica, order: session_pb2.GenerateRequest) -> None:
        if node.is_dead:
            if self._random.random() < 0.5:
                self._note(f"{replica.replica_id} is back")
                node.is_dead, node.fence = False, EpochFence()
                node.owners, node.latest, node.kept = {}, {}, {}
            raise ReplicaGone(f"{replica.replica_id} is dead")
        if self._random.random() < self._faults:
            self._note(f"{replica.replica_id} is full")
            raise QueueFull("full")
        if node.owners.get(order.session_id, -1) >= order.epoch:
            raise Fenced(f"{order.session_id} has a later owner here")
        node.fence.admit(order.session_id, order.epoch, follows=order.follows)

    def _check_order(self, node: ToyNode, order: session_pb2.GenerateRequest) -> None:
        """Take note of an owner, and of a breach if a later one has been at this replica."""
        latest = node.latest.get(order.session_id, -1)
        if order.epoch <= latest:
            self.breaches.append(f"{order.replica_id} took epoch {order.epoch} after epoch {latest}")
        if not order.follows:
            node.latest[order.session_id] = order.epoch

    async def _events(
        self, node: ToyNode, replica: Replica, order: session_pb2.GenerateRequest
    ) -> AsyncGenerator[session_pb2.GenerateEvent]:
        log, sampling = list(order.generated_token_ids), order.sampling
        left = node.leaves
        for _ in range(self._random.randrange(4)):  # it computes what it was given
            await asyncio.sleep(0)
        while True:
            for _ in range(1 + self._random.randrange(3)):
                await asyncio.sleep(0)
            self._strike(node, replica)
            _check_owner(node, order)
            if node.leaves > left:
                left = node.leaves
                yield session_pb2.GenerateEvent(epoch=order.epoch, leave=session_pb2.Leave(grace_seconds=9))
            if order.epoch and self._random.random() < self._faults:
                self._note("a zombie speaks")
                yield _event(order.epoch - 1, len(log), LETTERS[0])
            if len(log) < sampling.max_tokens:
                log.append(toy_token(order.prompt_token_ids, sampling.seed, log))
                event = _event(order.epoch, len(log) - 1, log[-1])
            else:
                event = session_pb2.GenerateEvent(epoch=order.epoch, position=len(log))
            if len(log) == sampling.max_tokens:
                event.finish_reason = LENGTH
            if order.keep_seconds:
                node.kept[order.session_id] = _kept(order, log, event.finish_reason)
            yield event
            if event.finish_reason:
                return

    def _strike_move(self, phase: str, session_id: str, destination: Replica) -> None:
        """While a session moves: source, destination, both, the connection or the controller fail."""
        if self._random.random() >= min(0.5, 4 * self._faults):
            return
        what = self._random.choice(("source", "destination", "both", "connection", "controller"))
        self._note(f"{what} fails as a move {phase}")
        if what in ("source", "both"):
            self.nodes[self._owner[session_id]].is_dead = True
        if what in ("destination", "both"):
            self.nodes[destination.replica_id].is_dead = True
        if what == "connection":
            raise PeerError(f"the connection to {destination.replica_id} broke")
        if what == "controller":
            self.away_asks = 8

    def _strike(self, node: ToyNode, replica: Replica) -> None:
        if self._leader_changes and self.fate.random() < self._faults / 2:
            self._change_leader()
        draw = self._random.random()
        if draw < self._faults:
            self._note(f"{replica.replica_id} dies")
            node.is_dead = True
        elif draw < 3 * self._faults:
            self._note(f"{replica.replica_id} drains")
            node.leaves += 1

    def _note(self, what: str) -> None:
        self.history.append(what)

    def refusal(self) -> StokerError | None:
        """Return what the controller answers instead of a replica, if fate will have it."""
        if self.away_asks:
            self.away_asks -= 1
            if not self.away_asks:
                for table in self.tables:
                    table.apply(routes(list(self.nodes)))
            return PeerError("no controller")
        if self._random.random() < 0.3:
            return self._random.choice([PeerError("no controller"), LoadFailed("x", retry_after_seconds=1)])
        return None

    def any_replica(self, table: RouteTable) -> Replica:
        """Return what the controller answers."""
        return self._random.choice(table.find("tiny").replicas)


def _check_owner(node: ToyNode, order: session_pb2.GenerateRequest) -> None:
    """Raise what ends a session here: a later owner, or the node's death."""
    if node.owners.get(order.session_id, 0) > order.epoch:
        raise Fenced(f"{order.session_id} was taken over")
    if node.is_dead or node.owners.get(order.session_id) != order.epoch:
        raise WorkerDied(f"{order.replica_id} died")


def routes(names: Sequence[str]) -> controller_pb2.RoutesUpdate:
    """Return the routes of a controller that knows these replicas."""
    route = controller_pb2.Route(
        model=model_pb2.Model(spec=model_pb2.ModelSpec(name="tiny", checkpoint_uri="/m")),
        replicas=[
            controller_pb2.RouteReplica(replica_id=name, agent_address=name, max_batch=4) for name in names
        ],
    )
    return controller_pb2.RoutesUpdate(snapshot=True, routes=[route])


def _kept(
    order: session_pb2.GenerateRequest, log: Sequence[int], finish_reason: session_pb2.FinishReason.ValueType
) -> node_agent_pb2.KeptSession:
    return node_agent_pb2.KeptSession(
        session_id=order.session_id,
        epoch=order.epoch,
        replica_id=order.replica_id,
        fingerprint=order.fingerprint,
        tokens=[session_pb2.Token(id=token) for token in log],
        finish_reason=finish_reason,
    )


def _event(epoch: int, position: int, token: int) -> session_pb2.GenerateEvent:
    return session_pb2.GenerateEvent(epoch=epoch, position=position, tokens=[session_pb2.Token(id=token)])


class ToyPlacement(Placement):
    """The gateway's own placement, over a controller that is sometimes away."""

    def __init__(self, table: RouteTable, clock: ManualClock, cluster: ToyCluster) -> None:
        super().__init__(table, None, clock=clock, cold_timeout_seconds=9, patience_seconds=9)  # type: ignore[arg-type]
        self._cluster = cluster

    async def acquire(
        self,
        job: Job,
        *,
        failed: Sequence[str] = (),
        limit_seconds: float = 0,
        waited: Waited | None = None,
    ) -> Replica:
        """Answer, or not; whoever asks waits now."""
        assert waited is None or waited.since_seconds is not None
        return await self.start_another(job)

    async def start_another(self, job: Job, *, waited_seconds: float = 0.0) -> Replica:
        """Answer, or not."""
        assert waited_seconds >= 0
        await asyncio.sleep(0)
        if (error := self._cluster.refusal()) is not None:
            raise error
        return self._cluster.any_replica(self.table)
