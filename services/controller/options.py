"""Ways to start a model on one node: on free slots, by stopping idle replicas, by moving running ones. Pure.

Victims are chosen jointly and exactly: of all sets of replicas on the node that make enough room, the one
that costs least. A set is as slow as its slowest member (they go at the same time) and disturbs by their sum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.controller.estimate import Estimate, start_estimate
from services.controller.fleet import Member, Standing, is_idle, member
from services.controller.moves import move_seconds
from services.controller.room import (
    Situation,
    Wanted,
    can_ever,
    enough,
    free_slots,
    live_replicas,
    on_node,
    pool_has_room,
    wanted_of,
)
from services.controller.summary import worth_seconds
from services.controller.view import Node, Policy
from stoker.ids import ModelName, NodeId, ReplicaId

MAX_VICTIMS_CONSIDERED = 16
"""Replicas of one node looked at, the cheapest first: hosts have at most sixteen devices."""


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


class Destinations(Protocol):
    """Where replicas could move to without disturbing anybody."""

    def swiftest_seconds(self, name: ModelName) -> float:
        """Return what starting the model takes at least, were there a free node with all of it in memory."""

    def least_seconds(self, name: ModelName) -> float | None:
        """Return what starting the model elsewhere takes at least; None = it can't be started anywhere."""

    def best(self, name: ModelName, not_on: NodeId, count: int) -> tuple[Option, ...]:
        """Return the best `count` ways to start a model on other nodes than `not_on`, the best first."""


def best_on(
    situation: Situation, node: Node, destinations: Destinations, limit: Rank | None
) -> Option | None:
    """Return the best way to start the model on this node now; None where there is none below `limit`."""
    if not can_ever(situation.wanted, node, situation.index.summaries[node.node_id]):
        return None
    free = free_option(situation, node, situation.wanted)
    if free is not None or not situation.may_disturb:
        return free
    search = _Cheapest(situation, node, destinations, limit)
    search.run()
    return search.best


def free_option(situation: Situation, node: Node, wanted: Wanted) -> Option | None:
    """Return the option that disturbs nobody."""
    free = free_slots(wanted, situation.index.summaries[node.node_id])
    if len(free) < wanted.slots or not pool_has_room(situation, node, (), (wanted.model,)):
        return None
    return Option(
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Victim:
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


def _victims(situation: Situation, node: Node, destinations: Destinations) -> list[_Victim]:
    view, policy = situation.view, situation.policy
    summary = situation.index.summaries[node.node_id]
    found: list[_Victim] = []
    for key, replica_id in summary.worth_keys:
        reserved = member(view, view.reservations[replica_id])
        if reserved.reservation.model != situation.model.name and idle_may_go(situation, reserved):
            found.append(
                _Victim(
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


def _busy_victim(situation: Situation, found: Member, destinations: Destinations) -> _Victim | None:
    """Return how a replica that serves sessions could go: moved, or drained after the bound; None = not."""
    policy, name = situation.policy, found.reservation.model
    if policy.may_migrate:
        tokens = found.replica.context_tokens if found.replica else 0
        seconds = move_seconds(situation.view, name, tokens, policy)
        return _Victim(
            member=found,
            name=name,
            wait_seconds=destinations.swiftest_seconds(name) + seconds,
            disturbance_seconds=seconds,
            moves=True,
        )
    if not _has_stayed(situation, found, policy.waiting_bound_seconds):
        return None
    seconds = policy.drain_grace_seconds
    return _Victim(member=found, name=name, wait_seconds=seconds, disturbance_seconds=seconds, drains=True)


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


class _Cheapest:
    """Branch and bound over sets of victims; a set's cost never falls as it grows, so large ones are cut."""

    def __init__(
        self, situation: Situation, node: Node, destinations: Destinations, limit: Rank | None
    ) -> None:
        self.best: Option | None = None
        self._limit = limit
        self._situation = situation
        self._node = node
        self._victims = victims = _victims(situation, node, destinations)
        self._destinations = destinations
        self._spare = {
            name: live_replicas(situation, name) - situation.view.models[name].min_replicas
            for name in {victim.name for victim in victims}
        }
        wanted, summary = situation.wanted, situation.index.summaries[node.node_id]
        self._fitting = frozenset(wanted.slots_that_fit(summary.shape))
        self._missing_slots = wanted.slots - len(self._fitting.intersection(summary.free))
        self._pool_has_room = pool_has_room(situation, node, (), (wanted.model,))
        self._estimate = estimate_on(situation, node, wanted)
        self._weight = 1.0 if situation.waited_too_long else situation.policy.hysteresis_ratio
        self._preferred = len(situation.model.preferred_labels & node.labels)

    def run(self) -> None:
        """Find the best set, if any."""
        if self._victims and self._is_enough(self._victims):
            self._grow((), 0)

    def _is_enough(self, chosen: Sequence[_Victim]) -> bool:
        """Tell whether slots and pool suffice without these; must agree with `enough`."""
        slots = sum(len(self._fitting.intersection(victim.member.reservation.devices)) for victim in chosen)
        return slots >= self._missing_slots and (
            self._pool_has_room
            or pool_has_room(
                self._situation,
                self._node,
                tuple(victim.member for victim in chosen),
                (self._situation.model,),
            )
        )

    def _grow(self, chosen: tuple[_Victim, ...], begin: int) -> None:
        if chosen:
            if not self._could_win(chosen):
                return
            if self._is_enough(chosen):
                self._take(chosen)
                return
        taken = Counter(victim.name for victim in chosen if not victim.moves)
        for place in range(begin, len(self._victims)):
            victim = self._victims[place]
            if victim.moves or taken[victim.name] < self._spare[victim.name]:
                self._grow((*chosen, victim), place + 1)

    def _could_win(self, chosen: tuple[_Victim, ...]) -> bool:
        return self._limit is None or self._rank(chosen, ()) < self._limit

    def _rank(self, chosen: tuple[_Victim, ...], moves: tuple[Move, ...], moves_seconds: float = 0.0) -> Rank:
        """Return the rank of an option of these victims, without making it; must agree with `rank`."""
        disturbance_seconds = sum(sorted(victim.disturbance_seconds for victim in chosen))
        total_seconds = self._total_seconds(max(_wait_seconds(chosen, moves), moves_seconds))
        cost_seconds = total_seconds + self._weight * disturbance_seconds
        return (
            int(cost_seconds / self._situation.policy.tie_seconds),
            len(chosen),
            disturbance_seconds,
            -self._preferred,
            cost_seconds,
            self._node.node_id,
        )

    def _total_seconds(self, wait_seconds: float) -> float:
        estimate = self._estimate
        return (
            wait_seconds
            + estimate.worker_seconds
            + max(estimate.load_seconds, estimate.skeleton_seconds + estimate.first_forward_seconds)
            + estimate.overhead_seconds
        )

    def _take(self, chosen: tuple[_Victim, ...]) -> None:
        movers = [victim for victim in chosen if victim.moves]
        if movers:
            moves_seconds = 0.0
            for mover in movers:
                least_seconds = self._destinations.least_seconds(mover.name)
                if least_seconds is None:
                    return
                moves_seconds = max(moves_seconds, least_seconds + mover.disturbance_seconds)
            if self._limit is not None and self._rank(chosen, (), moves_seconds) >= self._limit:
                return
        self._assign(chosen, movers, ())

    def _assign(self, chosen: tuple[_Victim, ...], movers: list[_Victim], moves: tuple[Move, ...]) -> None:
        """Give each mover a destination that no other mover takes, over all combinations that could win."""
        ranked = self._rank(chosen, moves)
        if self._limit is not None and ranked >= self._limit:
            return
        if len(moves) == len(movers):
            self.best, self._limit = self._option(chosen, moves), ranked
            return
        mover = movers[len(moves)]
        for destination in self._destinations.best(mover.name, self._node.node_id, len(movers)):
            move = self._move(mover, destination, moves)
            if move is not None:
                self._assign(chosen, movers, (*moves, move))

    def _move(self, mover: _Victim, destination: Option, moves: tuple[Move, ...]) -> Move | None:
        situation = self._situation
        model, node = situation.view.models[mover.name], situation.view.nodes[destination.node_id]
        others = [move for move in moves if move.to_node_id == node.node_id]
        devices = destination.devices
        if others:
            wanted = wanted_of(situation.view, situation.index, mover.name)
            taken = {device for move in others for device in move.to_devices}
            free = free_slots(wanted, situation.index.summaries[node.node_id])
            devices = tuple(sorted([slot for slot in free if slot not in taken][: wanted.slots]))
            coming = (model, *(situation.view.models[move.model] for move in others))
            if len(devices) < wanted.slots or not pool_has_room(situation, node, (), coming):
                return None
        return Move(
            replica_id=mover.member.reservation.replica_id,
            model=model.name,
            to_node_id=node.node_id,
            to_devices=devices,
            estimate=destination.estimate,
            seconds=mover.disturbance_seconds,
        )

    def _option(self, chosen: tuple[_Victim, ...], moves: tuple[Move, ...]) -> Option:
        """Return the option of these victims; movers without a destination yet count their least."""
        situation, node = self._situation, self._node
        members = tuple(victim.member for victim in chosen)
        wanted = situation.wanted
        free = free_slots(wanted, situation.index.summaries[node.node_id], members)
        estimate = self._estimate
        return Option(
            node_id=node.node_id,
            devices=tuple(sorted(free[: wanted.slots])),
            victims=tuple(sorted(found.reservation.replica_id for found in members)),
            estimate=Estimate(
                worker_seconds=estimate.worker_seconds,
                stage_seconds=estimate.stage_seconds,
                skeleton_seconds=estimate.skeleton_seconds,
                first_forward_seconds=estimate.first_forward_seconds,
                stop_seconds=_wait_seconds(chosen, moves),
                overhead_seconds=estimate.overhead_seconds,
                tier=estimate.tier,
            ),
            disturbance_seconds=sum(sorted(victim.disturbance_seconds for victim in chosen)),
            moves=tuple(sorted(moves, key=lambda move: move.replica_id)),
            drained=frozenset(victim.member.reservation.replica_id for victim in chosen if victim.drains),
            preferred=self._preferred,
            weight=self._weight,
        )


def _wait_seconds(chosen: tuple[_Victim, ...], moves: tuple[Move, ...]) -> float:
    """Return when the last of the victims is gone: they go at the same time."""
    moving = (move.estimate.total_seconds + move.seconds for move in moves)
    return max(*(victim.wait_seconds for victim in chosen), *moving, 0.0)


def room_is_being_made(situation: Situation, node: Node) -> bool:
    """Tell whether replicas on their way out will leave enough room, and for this model."""
    leaving = tuple(
        found
        for found in on_node(situation, node)
        if (found.standing is Standing.STOPPING or found.reservation.moving_to is not None)
        and found.reservation.stopping_for in (None, situation.model.name)
        and found.reservation.model in situation.view.models
    )
    return bool(leaving) and not enough(situation, node, ()) and enough(situation, node, leaving)
