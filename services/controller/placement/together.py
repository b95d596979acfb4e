"""Models that want a replica at the same time: who chooses first, so that two don't fight for one node. Pure.

Each chooses what is best for it, after those before it; so a plan for all is an order. Of all orders the best
one is that in which

1. the longest waiting model gets room if any order gives it some, then the next one, and so on;
2. the sum of what all of them cost (time to start, and disturbance by its weight) is least;
3. in a tie of `tie_seconds` who waits longest goes first.

Idle replicas to stop and running ones to move are part of it, as in any decision. Orders are tried depth
first, beginning with the longest waiting, and only where choices touch: models whose best choices are on
nodes of their own need no order. A choice gets no cheaper when others choose before, so what each costs now
bounds what it costs later, and most orders are never tried. After `MAX_PLACEMENTS` the best order found so
far is taken: at worst the order of waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.view import Policy, View
from services.controller.placement.outcome import outcome
from services.controller.placement.place import Decision, Migrate, Placed, StopIdle, place
from stoker.ids import ModelName, NodeId, ReplicaId

MAX_TOGETHER = 8
"""Models that are ordered together."""
MAX_PLACEMENTS = 64
"""Placements looked at for one order: every order of four models that all fight, and most of more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A model that wants a replica, what may be done for it, and how many it lacks."""

    name: ModelName
    policy: Policy
    may_disturb: bool
    lacking: int = 1


def order_together(view: View, asks: Sequence[Ask], now_seconds: float) -> tuple[Ask, ...]:
    """Return the order in which these models choose their nodes.

    Args:
        view: The cluster.
        asks: Longest waiting first, at most `MAX_TOGETHER`; more are left where they are, behind the others.
        now_seconds: The view's clock.
    """
    if len(asks) < 2:  # noqa: PLR2004 - one alone fights nobody
        return tuple(asks)
    orders = _Orders(asks[:MAX_TOGETHER], now_seconds)
    orders.run(view)
    return (*orders.best, *asks[MAX_TOGETHER:])


class _Orders:
    """Branch and bound over the orders in which models choose."""

    def __init__(self, asks: Sequence[Ask], now_seconds: float) -> None:
        self.best: tuple[Ask, ...] = tuple(asks)
        self._asks = self.best
        self._now_seconds = now_seconds
        self._least: tuple[tuple[bool, ...], float] | None = None
        """Of the best order: who finds no room, longest waiting first, and what the others cost."""
        self._left = MAX_PLACEMENTS
        self._ids = count()

    def run(self, view: View) -> None:
        """Find the best order."""
        self._grow(view, (), self._asks, 0.0, frozenset())

    def _grow(
        self,
        view: View,
        chosen: tuple[Ask, ...],
        left: tuple[Ask, ...],
        cost_seconds: float,
        roomless: frozenset[ModelName],
    ) -> None:
        found: dict[ModelName, Decision] = {}
        bound_seconds = cost_seconds
        for ask in left:
            if not self._left:
                return
            self._left -= 1
            decision = place(
                view,
                ask.name,
                self._now_seconds,
                ask.policy,
                may_disturb=ask.may_disturb,
                lacking=ask.lacking,
            )
            if isinstance(decision, Placed | StopIdle | Migrate):
                found[ask.name] = decision
                bound_seconds += decision.options[0].cost_seconds
            else:
                roomless |= {ask.name}
            if not self._could_win(roomless, bound_seconds):
                return
        able = tuple(ask for ask in left if ask.name in found)
        rivals = _rivals(able, found)
        if not rivals:
            self._keep((*chosen, *able), roomless, bound_seconds)
            return
        for ask in rivals:
            decision = found[ask.name]
            after = view
            for event in outcome(view, ask.name, decision, self._now_seconds, new_id=self._new_id):
                after = fold(after, event)
            self._grow(
                after,
                (*chosen, ask),
                tuple(other for other in able if other is not ask),
                cost_seconds + _cost_seconds(decision),
                roomless,
            )

    def _could_win(self, roomless: frozenset[ModelName], bound_seconds: float) -> bool:
        if self._least is None:
            return True
        lost, least_seconds = self._least
        losing = self._losing(roomless)
        tie_seconds = self._asks[0].policy.tie_seconds
        return losing < lost or (losing == lost and bound_seconds < least_seconds - tie_seconds)

    def _keep(self, order: tuple[Ask, ...], roomless: frozenset[ModelName], cost_seconds: float) -> None:
        self._least = (self._losing(roomless), cost_seconds)
        self.best = (*order, *(ask for ask in self._asks if ask.name in roomless))

    def _losing(self, roomless: frozenset[ModelName]) -> tuple[bool, ...]:
        return tuple(ask.name in roomless for ask in self._asks)

    def _new_id(self) -> ReplicaId:
        return ReplicaId(f"together-{next(self._ids)}")


def _rivals(asks: Sequence[Ask], found: dict[ModelName, Decision]) -> list[Ask]:
    """Return those whose choices touch a node that another one's touches, too."""
    touched = {ask.name: _touched(found[ask.name]) for ask in asks}
    wanted = Counter(node_id for nodes in touched.values() for node_id in nodes)
    return [ask for ask in asks if any(wanted[node_id] > 1 for node_id in touched[ask.name])]


def _touched(decision: Decision) -> set[NodeId]:
    match decision:
        case Migrate(node_id=node_id, moves=moves):
            return {node_id, *(move.to_node_id for move in moves)}
        case Placed(node_id=node_id) | StopIdle(node_id=node_id):
            return {node_id}
        case _:
            return set()


def _cost_seconds(decision: Decision) -> float:
    match decision:
        case Placed(options=options) | StopIdle(options=options) | Migrate(options=options):
            return options[0].cost_seconds
        case _:
            return 0.0
