"""Who on a node could go to make room for a model, and what that costs at least. Pure.

What the node's summary keeps of each replica (`traits`) says who is idle, who is busy, and since when: nobody
is looked up again.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from services.controller.cluster_view.moves import move_seconds
from services.controller.cluster_view.traits import Trait, worth_seconds
from services.controller.cluster_view.view import Node, Reservation
from services.controller.placement.options import Option
from services.controller.placement.room import Situation
from stoker.ids import ModelName, NodeId, ReplicaId

MAX_VICTIMS_CONSIDERED = 16
"""Replicas of one node looked at, the cheapest first: hosts have at most sixteen devices."""


class Victim(NamedTuple):
    """A replica that could go, and what that costs; a tuple, because every decision makes a dozen.

    Attributes:
        reservation: Which.
        wait_seconds: Until its slots are free, at least.
        disturbance_seconds: What it costs others, at least.
        moves: It would have to be moved.
        move_seconds: How long that takes once its destination is ready.
        drains: It would be drained.
    """

    reservation: Reservation
    wait_seconds: float
    disturbance_seconds: float
    moves: bool = False
    move_seconds: float = 0.0
    drains: bool = False

    @property
    def name(self) -> ModelName:
        """Its model."""
        return self.reservation.model


_new_tuple = tuple.__new__
"""Makes a named tuple without the call that names its fields."""


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
    """Return the replicas of a node that could go now, with bounds of the cost; of many the cheapest ones."""
    policy, now_seconds, own = situation.policy, situation.now_seconds, situation.model.name
    residency_seconds, ends_served = policy.minimum_residency_seconds, policy.residency_ends_served
    may_disturb_busy = policy.may_migrate or situation.waited_too_long
    found: list[Victim] = []
    for trait in situation.index.summaries[node.node_id].traits:
        reservation, ready_seconds = trait.reservation, trait.settled_at_seconds
        if reservation.model == own or ready_seconds is None:
            continue
        if ready_seconds + residency_seconds > now_seconds and not (ends_served and trait.has_served):
            continue
        if trait.worth_key is not None:
            if idle_may_go(situation, trait):
                seconds = worth_seconds(trait.worth_key[0], now_seconds)
                said = (reservation, policy.stop_seconds, seconds, False, 0.0, False)
                found.append(_new_tuple(Victim, said))
        elif trait.busy is None or not may_disturb_busy:
            pass
        elif policy.may_migrate:
            busy = (node.replicas[reservation.replica_id].context_tokens, trait.busy)
            found.append(_mover(situation, reservation, busy, destinations))
        elif has_stayed(situation, trait, policy.waiting_bound_seconds):
            seconds = policy.drain_grace_seconds
            found.append(_new_tuple(Victim, (reservation, seconds, seconds, False, 0.0, True)))
    if len(found) > MAX_VICTIMS_CONSIDERED:
        found.sort(key=_by_disturbance)
        del found[MAX_VICTIMS_CONSIDERED:]
    return found


def _by_disturbance(victim: Victim) -> tuple[float, ReplicaId]:
    return victim.disturbance_seconds, victim.reservation.replica_id


def _mover(
    situation: Situation, reservation: Reservation, busy: tuple[int, int], destinations: Destinations
) -> Victim:
    """Return how a replica that serves sessions could be moved.

    A move holds two places until its destination is ready. Where the model lacks more replicas than this one
    that time is another one's wait, and counts.

    Args:
        situation: What the decision is about.
        reservation: Whose sessions move.
        busy: Their tokens, and the bytes that a start elsewhere copies to each device.
        destinations: Where it could move to.
    """
    view, policy, (tokens, byte_count) = situation.view, situation.policy, busy
    if view.moves:
        seconds = move_seconds(view, reservation.model, tokens, policy)
    else:
        seconds = policy.move_seconds_per_token * tokens + policy.move_seconds
    held_seconds = destinations.swiftest_seconds(reservation.model) if situation.lacking > 1 else 0.0
    start_seconds = held_seconds or destinations.copied_seconds(byte_count)  # its model is not looked up
    said = (reservation, start_seconds + seconds, seconds + held_seconds, True, seconds, False)
    return _new_tuple(Victim, said)


def idle_may_go(situation: Situation, trait: Trait) -> bool:
    """Tell whether a replica is idle and may be stopped for another model now."""
    if (
        trait.worth_key is None
        or trait.reservation.moving_to is not None
        or trait.reservation.model in situation.view.demands
    ):
        return False
    if trait.has_served and situation.policy.residency_ends_served:
        return trait.settled_at_seconds is not None
    return has_stayed(situation, trait, situation.policy.minimum_residency_seconds)


def has_stayed(situation: Situation, trait: Trait, seconds: float) -> bool:
    """Tell whether a replica became ready so long ago; one whose weights are still on their way has not."""
    ready_seconds = trait.settled_at_seconds
    return ready_seconds is not None and ready_seconds + seconds <= situation.now_seconds
