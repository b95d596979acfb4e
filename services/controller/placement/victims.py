"""Who on a node could go to make room for a model, and what that costs at least. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from services.controller.cluster_view.fleet import Member, is_idle, member
from services.controller.cluster_view.frozen import maker_of
from services.controller.cluster_view.moves import move_seconds
from services.controller.cluster_view.traits import worth_seconds
from services.controller.cluster_view.view import Node
from services.controller.placement.options import Option
from services.controller.placement.room import Situation
from stoker.ids import ModelName, NodeId

MAX_VICTIMS_CONSIDERED = 16
"""Replicas of one node looked at, the cheapest first: hosts have at most sixteen devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A replica that could go, and what that costs.

    Attributes:
        member: Which.
        name: Its model.
        wait_seconds: Until its slots are free, at least.
        disturbance_seconds: What it costs others, at least.
        moves: It would have to be moved.
        drains: It would be drained.
    """

    member: Member
    name: ModelName
    wait_seconds: float
    disturbance_seconds: float
    moves: bool = False
    drains: bool = False


make_victim = maker_of(Victim)


class Destinations(Protocol):
    """Where replicas could move to without disturbing anybody."""

    def swiftest_seconds(self, name: ModelName) -> float:
        """Return what starting the model takes at least, were there a free node with all of it in memory."""

    def least_seconds(self, name: ModelName) -> float | None:
        """Return what starting the model elsewhere takes at least; None = it can't be started anywhere."""

    def best(self, name: ModelName, not_on: NodeId, count: int) -> tuple[Option, ...]:
        """Return the best `count` ways to start a model on other nodes than `not_on`, the best first."""


def victims_on(situation: Situation, node: Node, destinations: Destinations) -> list[Victim]:
    """Return the replicas of a node that could go now, least disturbed first, with bounds of the cost."""
    view, policy = situation.view, situation.policy
    summary = situation.index.summaries[node.node_id]
    found: list[Victim] = []
    for key, replica_id in summary.worth_keys:
        reserved = member(view, view.reservations[replica_id])
        if reserved.reservation.model != situation.model.name and idle_may_go(situation, reserved):
            found.append(
                make_victim(
                    member=reserved,
                    name=reserved.reservation.model,
                    wait_seconds=policy.stop_seconds,
                    disturbance_seconds=worth_seconds(key, situation.now_seconds),
                )
            )
    if policy.may_migrate or situation.waited_too_long:
        for replica_id in summary.busy:
            reserved = member(view, view.reservations[replica_id])
            if reserved.reservation.model != situation.model.name and _has_stayed(
                situation, reserved, policy.minimum_residency_seconds
            ):
                victim = _busy_victim(situation, reserved, destinations)
                if victim is not None:
                    found.append(victim)
    found.sort(key=lambda victim: (victim.disturbance_seconds, victim.member.reservation.replica_id))
    return found[:MAX_VICTIMS_CONSIDERED]


def _busy_victim(situation: Situation, found: Member, destinations: Destinations) -> Victim | None:
    """Return how a replica that serves sessions could go: moved, or drained after the bound; None = not."""
    policy, name = situation.policy, found.reservation.model
    if policy.may_migrate:
        tokens = found.replica.context_tokens if found.replica else 0
        seconds = move_seconds(situation.view, name, tokens, policy)
        return make_victim(
            member=found,
            name=name,
            wait_seconds=destinations.swiftest_seconds(name) + seconds,
            disturbance_seconds=seconds,
            moves=True,
        )
    if not _has_stayed(situation, found, policy.waiting_bound_seconds):
        return None
    seconds = policy.drain_grace_seconds
    return make_victim(
        member=found, name=name, wait_seconds=seconds, disturbance_seconds=seconds, drains=True
    )


def idle_may_go(situation: Situation, found: Member) -> bool:
    """Tell whether this idle replica may be stopped for another model now."""
    name = found.reservation.model
    return (
        is_idle(found)
        and found.reservation.moving_to is None
        and name not in situation.view.demands
        and _has_stayed(situation, found, situation.policy.minimum_residency_seconds)
    )


def _has_stayed(situation: Situation, found: Member, seconds: float) -> bool:
    return _ready_since_seconds(found) + seconds <= situation.now_seconds


def _ready_since_seconds(found: Member) -> float:
    if found.replica is None:
        return 0.0
    return math.inf if found.replica.loading else found.replica.ready_since_seconds or 0.0
