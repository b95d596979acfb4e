"""Who on a node could go to make room for a model, and what that costs at least. Pure.

What the node's summary keeps of each replica (`traits`) says who is idle, who is busy, and since when: nobody
is looked up again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from services.controller.cluster_view.frozen import maker_of
from services.controller.cluster_view.moves import move_seconds
from services.controller.cluster_view.traits import Trait, worth_seconds
from services.controller.cluster_view.view import Node, Reservation
from services.controller.placement.options import Option
from services.controller.placement.room import Situation
from stoker.ids import ModelName, NodeId, ReplicaId

MAX_VICTIMS_CONSIDERED = 16
"""Replicas of one node looked at, the cheapest first: hosts have at most sixteen devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A replica that could go, and what that costs.

    Attributes:
        reservation: Which.
        name: Its model.
        wait_seconds: Until its slots are free, at least.
        disturbance_seconds: What it costs others, at least.
        moves: It would have to be moved.
        move_seconds: How long that takes once its destination is ready.
        drains: It would be drained.
    """

    reservation: Reservation
    name: ModelName
    wait_seconds: float
    disturbance_seconds: float
    moves: bool = False
    move_seconds: float = 0.0
    drains: bool = False


make_victim = maker_of(Victim)


class Destinations(Protocol):
    """Where replicas could move to without disturbing anybody."""

    def copied_seconds(self, byte_count: int) -> float:
        """Return what copying so many bytes to a device takes at least: no start is over sooner."""

    def swiftest_seconds(self, name: ModelName) -> float:
        """Return what starting the model takes at least, were there a free node with all of it in memory."""

    def floor_seconds(self, name: ModelName) -> float | None:
        """Return what no start elsewhere is quicker than, not above `least_seconds`; None = nowhere."""

    def least_seconds(self, name: ModelName) -> float | None:
        """Return what starting the model elsewhere takes at least; None = it can't be started anywhere."""

    def best(self, name: ModelName, not_on: NodeId, count: int) -> tuple[Option, ...]:
        """Return the best `count` ways to start a model on other nodes than `not_on`, the best first."""


def victims_on(situation: Situation, node: Node, destinations: Destinations) -> list[Victim]:
    """Return the replicas of a node that could go now, least disturbed first, with bounds of the cost."""
    policy, own = situation.policy, situation.model.name
    may_disturb_busy = policy.may_migrate or situation.waited_too_long
    found: list[Victim] = []
    for trait in situation.index.summaries[node.node_id].traits:
        name = trait.reservation.model
        if name == own:
            continue
        if trait.worth_key is not None:
            if idle_may_go(situation, trait):
                seconds = worth_seconds(trait.worth_key[0], situation.now_seconds)
                found.append(
                    make_victim(
                        reservation=trait.reservation,
                        name=name,
                        wait_seconds=policy.stop_seconds,
                        disturbance_seconds=seconds,
                    )
                )
        elif (
            trait.busy is not None
            and may_disturb_busy
            and _has_stayed(situation, trait, policy.minimum_residency_seconds)
        ):
            tokens = node.replicas[trait.reservation.replica_id].context_tokens
            victim = _busy_victim(situation, trait, tokens, trait.busy, destinations)
            if victim is not None:
                found.append(victim)
    found.sort(key=_by_disturbance)
    return found[:MAX_VICTIMS_CONSIDERED]


def _by_disturbance(victim: Victim) -> tuple[float, ReplicaId]:
    return victim.disturbance_seconds, victim.reservation.replica_id


def _busy_victim(
    situation: Situation, trait: Trait, tokens: int, byte_count: int, destinations: Destinations
) -> Victim | None:
    """Return how a replica that serves sessions could go: moved, or drained after the bound; None = not.

    A move holds two places until its destination is ready. Where the model lacks more replicas than this one
    that time is another one's wait, and counts.
    """
    policy, name = situation.policy, trait.reservation.model
    if policy.may_migrate:
        seconds = move_seconds(situation.view, name, tokens, policy)
        held_seconds = destinations.swiftest_seconds(name) if situation.lacking > 1 else 0.0
        start_seconds = held_seconds or destinations.copied_seconds(byte_count)  # its model is not looked up
        return make_victim(
            reservation=trait.reservation,
            name=name,
            wait_seconds=start_seconds + seconds,
            disturbance_seconds=seconds + held_seconds,
            moves=True,
            move_seconds=seconds,
        )
    if not _has_stayed(situation, trait, policy.waiting_bound_seconds):
        return None
    seconds = policy.drain_grace_seconds
    return make_victim(
        reservation=trait.reservation,
        name=name,
        wait_seconds=seconds,
        disturbance_seconds=seconds,
        drains=True,
    )


def idle_may_go(situation: Situation, trait: Trait) -> bool:
    """Tell whether a replica is idle and may be stopped for another model now."""
    return (
        trait.worth_key is not None
        and trait.reservation.moving_to is None
        and trait.reservation.model not in situation.view.demands
        and _has_stayed(situation, trait, situation.policy.minimum_residency_seconds)
    )


def _has_stayed(situation: Situation, trait: Trait, seconds: float) -> bool:
    """Tell whether a replica became ready so long ago; one whose weights are still on their way has not."""
    ready_seconds = trait.settled_at_seconds
    return ready_seconds is not None and ready_seconds + seconds <= situation.now_seconds
