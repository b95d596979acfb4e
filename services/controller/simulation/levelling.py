"""Rebalancing in the simulated cluster: `rebalance` as it is, its orders done as agents would."""

from __future__ import annotations

from collections.abc import Mapping

from services.controller.cluster_view.view import Policy, View
from services.controller.scaling.actions import Migrate
from services.controller.scaling.clearing import migrations
from services.controller.scaling.rebalancing import Rebalanced, RebalanceLimits, rebalance
from services.controller.simulation.parts import SimReplica
from services.controller.simulation.world import World
from stoker.ids import ReplicaId

LOOK_SECONDS = 1.0
"""The product's default (`rebalance_look_seconds`)."""


class Levelling:
    """Looks now and then at what running sessions should move.

    Args:
        limits: What it may do.
    """

    def __init__(self, limits: RebalanceLimits) -> None:
        self._limits = limits
        self._rebalanced = Rebalanced()
        self._next_seconds = 0.0

    def look(
        self, view: View, policy: Policy, replicas: Mapping[ReplicaId, SimReplica], world: World
    ) -> tuple[Migrate, ...]:
        """Decide if it is time to; have sessions move, and return the replicas that should."""
        if world.now < self._next_seconds:
            return ()
        self._next_seconds = world.now + LOOK_SECONDS
        self._rebalanced = rebalance(view, self._rebalanced, world.now, policy, self._limits)
        for shift in self._rebalanced.shifts:
            world.shift(replicas[shift.replica_id], replicas[shift.to_replica_id], shift.sessions)
        clearing = self._rebalanced.clearing
        return migrations(view, clearing) if clearing is not None else ()

    def due_seconds(self) -> float:
        """Return when the next look is due."""
        return self._next_seconds
