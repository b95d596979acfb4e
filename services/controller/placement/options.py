"""Ways to start a model on one node, how they are ordered, and the one that disturbs nobody. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from services.controller.cluster_view.estimate import Estimate, start_estimate
from services.controller.cluster_view.frozen import maker_of
from services.controller.cluster_view.view import Node, Policy
from services.controller.placement.room import Situation, Wanted, free_slots, pool_has_room, promised_slots
from stoker.ids import ModelName, NodeId, ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A running replica that goes elsewhere: started there first, then its sessions follow."""

    replica_id: ReplicaId
    model: ModelName
    to_node_id: NodeId
    to_devices: tuple[int, ...]
    estimate: Estimate
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to start the model.

    Attributes:
        node_id: Where.
        devices: Slots it would get; those of its victims included.
        victims: Replicas to stop or move first, sorted.
        estimate: Until ready.
        disturbance_seconds: What stopping or moving the victims is expected to cost others.
        moves: Those of the victims that are moved, and where to; by replica.
        drained: Those of the victims that serve sessions and are drained, not moved.
        preferred: Preferred labels that the node carries.
        weight: What a second of disturbance counts (the policy's hysteresis).
    """

    node_id: NodeId
    devices: tuple[int, ...]
    victims: tuple[ReplicaId, ...]
    estimate: Estimate
    disturbance_seconds: float
    moves: tuple[Move, ...] = ()
    drained: frozenset[ReplicaId] = frozenset()
    preferred: int = 0
    weight: float = 1.0

    @property
    def cost_seconds(self) -> float:
        """What options are compared by."""
        return self.estimate.total_seconds + self.weight * self.disturbance_seconds


make_move, make_option = maker_of(Move), maker_of(Option)
"""The same as their constructors, faster: every decision makes some of both."""

Rank = tuple[int, int, float, int, float, str]


def rank(option: Option, policy: Policy) -> Rank:
    """Return what options are ordered by: equal steps of cost, then the smaller disturbance."""
    cost_seconds = option.cost_seconds
    return (
        int(cost_seconds / policy.tie_seconds),
        len(option.victims),
        option.disturbance_seconds,
        -option.preferred,
        cost_seconds,
        option.node_id,
    )


def free_option(situation: Situation, node: Node, wanted: Wanted) -> Option | None:
    """Return the option that disturbs nobody."""
    summary = situation.index.summaries[node.node_id]
    free = free_slots(wanted, summary)
    if summary.leaving_for and len(free) - promised_slots(situation, summary) < wanted.slots:
        return None
    if len(free) < wanted.slots or not pool_has_room(situation, node, (), (wanted.model,)):
        return None
    return make_option(
        node_id=node.node_id,
        devices=tuple(sorted(free[: wanted.slots])),
        victims=(),
        estimate=estimate_on(situation, node, wanted),
        disturbance_seconds=0.0,
        preferred=len(wanted.model.preferred_labels & node.labels),
    )


def estimate_on(situation: Situation, node: Node, wanted: Wanted) -> Estimate:
    """Estimate a start on `node`, behind all that is under way there."""
    summary = situation.index.summaries[node.node_id]
    return start_estimate(
        wanted.model,
        node,
        parts=wanted.parts,
        loading_bytes=summary.loading_bytes,
        starting_workers=summary.starting_workers,
        has_peer=wanted.has_peer(node.node_id),
        is_coming=wanted.model.checkpoint in summary.loading,
    )
