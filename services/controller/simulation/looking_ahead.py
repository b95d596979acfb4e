"""Forecasts in the simulated cluster: `foresee` as it is, and prefetches as stores carry them out."""

from __future__ import annotations

from dataclasses import replace

from services.controller.cluster_view.view import View
from services.controller.scaling.foresight import (
    SETTLE_SECONDS,
    Foreseen,
    Limits,
    Prefetch,
    attend,
    foresee,
    has_ended,
)
from services.controller.simulation.world import World
from stoker.ids import NodeId

LOOK_SECONDS = 5.0
"""The product's default (`forecast_look_seconds`)."""


class LookingAhead:
    """Looks at the forecasts now and then.

    Args:
        limits: What they may do; pre-started workers are not simulated.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = replace(limits, worker_memory_bytes=0)
        self._foreseen = Foreseen()
        self._next_seconds = 0.0
        self._attends_seconds = 0.0

    def look(self, view: View, world: World) -> float:
        """Decide what is due, and begin it; return when to look again."""
        if world.now >= self._next_seconds:
            self._next_seconds = world.now + LOOK_SECONDS
            self._begin_all(foresee(view, self._foreseen, world.now, self._limits), world)
        elif view.refusals and world.now >= self._attends_seconds:
            self._begin_all(attend(view, self._foreseen, world.now, self._limits), world)
        return min(self._next_seconds, self._attends_seconds) if view.refusals else self._next_seconds

    def _begin_all(self, foreseen: Foreseen, world: World) -> None:
        self._foreseen = foreseen
        self._attends_seconds = world.now + SETTLE_SECONDS
        for prefetch in foreseen.prefetches:
            self._begin(prefetch, world)

    def _begin(self, prefetch: Prefetch, world: World) -> None:
        node = world.nodes[prefetch.node_id]
        for name in prefetch.drop:
            node.dram.pop(name, None)
            node.moved[name] = None
            node.holdings += 1
        world.prefetch(
            world.models[prefetch.model],
            node,
            lambda complete: self._ended(prefetch.node_id, world.now, failed=not complete),
        )

    def _ended(self, node_id: NodeId, now_seconds: float, *, failed: bool) -> None:
        self._foreseen = has_ended(self._foreseen, node_id, now_seconds, failed=failed)
        if not failed:
            self._next_seconds = min(self._next_seconds, now_seconds + SETTLE_SECONDS)
