"""Carries rebalancing out for one term: looks now and then, has sessions asked to move, and replicas moved.

What to do is decided by `rebalancing`; nothing here decides. Sessions move as for `stoker migrate`: their
agent asks the gateways, which move one after the other, and a move that fails leaves its session where it is.
A whole replica moves as for placement.
"""

from __future__ import annotations

from typing import Protocol

from services.controller import metrics
from services.controller.cluster_view.view import Policy, View
from services.controller.scaling.actions import Migrate, Start
from services.controller.scaling.clearing import Clearing, migrations
from services.controller.scaling.crowding import Shift
from services.controller.scaling.rebalancing import Rebalanced, RebalanceLimits, has_failed, rebalance
from stoker.background import Background, background
from stoker.clock import Clock
from stoker.errors import Fenced, PeerError, StokerError
from stoker.ids import ReplicaId


class Cluster(Protocol):
    """What is looked at, told, and ordered."""

    view: View
    policy: Policy

    def tell(self, kind: str, **fields: object) -> None:
        """Log an event, and keep it for operators."""
        ...

    def order(self, action: Migrate | Start) -> None:
        """Have a move begun."""
        ...


class Agents(Protocol):
    """Calls to node agents; see `Orders`."""

    async def shift_sessions(
        self, address: str, replica_id: ReplicaId, *, to_replica_id: ReplicaId, max_sessions: int, reason: str
    ) -> int:
        """Have some of a replica's sessions asked to move; returns how many were."""
        ...


class Rebalancer:
    """Rebalances while its controller leads.

    Args:
        cluster: What is known, and who is told.
        agents: Takes the orders.
        limits: What it may do.
        look_seconds: From one look to the next.
        begin_seconds: Before the first: a new leader hears from its nodes first.
        clock: The view's.
    """

    def __init__(  # noqa: PLR0913 - what it joins
        self,
        cluster: Cluster,
        agents: Agents,
        limits: RebalanceLimits,
        *,
        look_seconds: float,
        begin_seconds: float,
        clock: Clock,
    ) -> None:
        self._cluster = cluster
        self._agents = agents
        self._limits = limits
        self._look_seconds = look_seconds
        self._begin_seconds = begin_seconds
        self._clock = clock
        self._rebalanced = Rebalanced()

    async def run(self) -> None:
        """Look until cancelled; sessions on their way go on."""
        await self._clock.sleep(self._begin_seconds)
        async with background() as tasks:
            while True:
                self.look(tasks)
                await self._clock.sleep(self._look_seconds)

    def look(self, tasks: Background) -> None:
        """Decide once, and begin what was decided."""
        cluster = self._cluster
        self._rebalanced = rebalance(
            cluster.view, self._rebalanced, self._clock.now_seconds(), cluster.policy, self._limits
        )
        for shift in self._rebalanced.shifts:
            tasks.start(self._shift(shift), name=f"shift-{shift.replica_id}")
        if self._rebalanced.clearing is not None:
            self._clear(self._rebalanced.clearing)

    async def _shift(self, shift: Shift) -> None:
        what = {
            "model": shift.model,
            "replica_id": shift.replica_id,
            "node_id": shift.node_id,
            "to_replica_id": shift.to_replica_id,
            "to_node_id": shift.to_node_id,
        }
        node = self._cluster.view.nodes.get(shift.node_id)
        try:
            if node is None:
                raise PeerError(f"node {shift.node_id} left before its sessions could be asked to move")
            asked = await self._agents.shift_sessions(
                node.agent_address,
                shift.replica_id,
                to_replica_id=shift.to_replica_id,
                max_sessions=shift.sessions,
                reason="rebalanced: too many sessions here, room there",
            )
        except Fenced:
            raise
        except StokerError as error:
            metrics.SHIFTS.labels(outcome="failed").inc()
            now_seconds = self._clock.now_seconds()
            self._rebalanced = has_failed(self._rebalanced, shift, now_seconds, self._limits)
            self._cluster.tell("sessions.not_shifted", **what, error_code=error.code, message=error.message)
            return
        metrics.SHIFTS.labels(outcome="ordered").inc()
        metrics.SHIFTED_SESSIONS.inc(asked)
        self._cluster.tell(
            "sessions.shifted",
            **what,
            sessions=asked,
            reason="crowded",
            crowded_seconds=round(shift.crowded_seconds, 3),
            cost_seconds=round(shift.cost_seconds, 4),
        )

    def _clear(self, clearing: Clearing) -> None:
        metrics.CLEARINGS.inc()
        self._cluster.tell(
            "node.cleared",
            node_id=clearing.node_id,
            model=clearing.model,
            replica_ids=", ".join(move.replica_id for move in clearing.moves),
            reason="the model wants a place now" if clearing.wanted else "the model will want a place",
            gain_seconds=round(clearing.gain_seconds, 3),
            cost_seconds=round(clearing.cost_seconds, 4),
        )
        for move in migrations(self._cluster.view, clearing):
            self._cluster.order(move)
