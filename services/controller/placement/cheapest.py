"""The cheapest way to start a model on one node, if need be by making room there. Pure.

Victims are chosen jointly and exactly: of all sets of replicas on the node that make enough room, the one
that costs least. A set is as slow as its slowest member (they go at the same time) and disturbs by their sum.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter

from services.controller.cluster_view.estimate import make_estimate
from services.controller.cluster_view.view import Node
from services.controller.placement.options import (
    Move,
    Option,
    Rank,
    estimate_on,
    free_option,
    make_move,
    make_option,
)
from services.controller.placement.room import (
    Situation,
    can_ever,
    free_slots,
    live_replicas,
    pool_has_room,
    promised_slots,
    wanted_of,
)
from services.controller.placement.victims import Destinations, Victim, victims_on
from stoker.ids import ModelName, ReplicaId


def best_on(
    situation: Situation, node: Node, destinations: Destinations, limit: Rank | None
) -> Option | None:
    """Return the best way to start the model on this node now; None where there is none below `limit`."""
    if not can_ever(situation.wanted, node, situation.index.summaries[node.node_id]):
        return None
    free = free_option(situation, node, situation.wanted)
    if free is not None or not situation.may_disturb:
        return free
    search = Cheapest(situation, node, destinations, limit)
    search.run()
    return search.best


_first = itemgetter(0)


class Cheapest:
    """Branch and bound over sets of victims; a set's cost never falls as it grows, so large ones are cut.

    Victims come in the order of what each costs at least alone: mostly the first one wins, and where the
    others could go is not looked for.
    """

    def __init__(
        self, situation: Situation, node: Node, destinations: Destinations, limit: Rank | None
    ) -> None:
        self.best: Option | None = None
        self._limit = limit
        self._chosen: tuple[Victim, ...] = ()
        self._moves: tuple[Move, ...] = ()
        """Of the best set found: an option is made of the last one only."""
        self._situation = situation
        self._node = node
        victims = victims_on(situation, node, destinations)
        self._destinations = destinations
        self._looks = (destinations.floor_seconds, destinations.least_seconds)
        """What a mover takes at least to start elsewhere, the cheaper look first."""
        wanted, summary = situation.wanted, situation.index.summaries[node.node_id]
        self._fitting = frozenset(wanted.slots_that_fit(summary.shape))
        promised = promised_slots(situation, summary) if summary.leaving_for else 0
        self._missing_slots = wanted.slots + promised - len(self._fitting.intersection(summary.free))
        self._pool_has_room = pool_has_room(situation, node, (), (wanted.model,))
        self._estimate = estimate = estimate_on(situation, node, wanted)
        self._loaded_seconds = max(
            estimate.load_seconds, estimate.skeleton_seconds + estimate.first_forward_seconds
        )
        self._weight = 1.0 if situation.waited_too_long else situation.policy.hysteresis_ratio
        self._preferred = len(situation.model.preferred_labels & node.labels)
        self._victims = victims
        self._ranks: list[Rank] = []
        """What each costs at least alone, the lowest first once the search has begun."""

    def run(self) -> None:
        """Find the best set, if any."""
        if self._victims and self._is_enough(self._victims):
            self._order()
            self._grow((), 0)
        if self._chosen:
            self.best = self._option(self._chosen, self._moves)

    def _is_enough(self, chosen: Sequence[Victim]) -> bool:
        """Tell whether slots and pool suffice without these; must agree with `enough`."""
        slots = 0
        for victim in chosen:
            slots += len(self._fitting.intersection(victim.reservation.devices))
            if slots >= self._missing_slots:
                break
        return slots >= self._missing_slots and (
            self._pool_has_room
            or pool_has_room(
                self._situation,
                self._node,
                tuple([victim.reservation for victim in chosen]),
                (self._situation.model,),
            )
        )

    def _order(self) -> None:
        """Put the victim first that costs least: who moves is looked at closer while it might be the one."""
        ranked = self._ranked()
        ranked.sort(key=_first)
        looked: dict[ReplicaId, int] = {}
        while ranked and ranked[0][1].moves and (self._limit is None or ranked[0][0] < self._limit):
            mover = ranked[0][1]
            replica_id = mover.reservation.replica_id
            looks = looked.get(replica_id, 0)
            if looks == len(self._looks):
                break
            seconds = self._looks[looks](mover.name)
            looked[replica_id] = looks + 1
            del ranked[0]
            if seconds is not None:
                wait_seconds = max(mover.wait_seconds, seconds + mover.move_seconds)
                insort(ranked, (self._rank_alone(mover, wait_seconds), mover), key=_first)
        self._ranks = [rank for rank, _ in ranked]
        self._victims = [victim for _, victim in ranked]

    def _ranked(self) -> list[tuple[Rank, Victim]]:
        """Return the victims that might win alone, each with what it costs: `_rank_alone`, written out."""
        estimate, weight, limit, node_id = self._estimate, self._weight, self._limit, self._node.node_id
        worker, loaded, overhead = (
            estimate.worker_seconds,
            self._loaded_seconds,
            estimate.overhead_seconds,
        )
        tie_seconds, less_preferred = self._situation.policy.tie_seconds, -self._preferred
        found: list[tuple[Rank, Victim]] = []
        for victim in self._victims:
            disturbance = victim.disturbance_seconds
            cost = victim.wait_seconds + worker + loaded + overhead + weight * disturbance
            rank = (int(cost / tie_seconds), 1, disturbance, less_preferred, cost, node_id)
            if limit is None or rank < limit:
                found.append((rank, victim))
        return found

    def _grow(self, chosen: tuple[Victim, ...], begin: int) -> None:
        """Take the set if it makes room, else try it with one more of the victims from `begin` on."""
        if chosen and self._is_enough(chosen):
            self._take(chosen)
            return
        taken: Mapping[ModelName, int] = (
            Counter([victim.name for victim in chosen if not victim.moves]) if chosen else {}
        )
        for place in range(begin, len(self._victims)):
            if self._limit is not None and self._ranks[place] >= self._limit:
                return  # a set costs no less than each of its members
            victim = self._victims[place]
            if victim.moves or taken.get(victim.name, 0) < self._spare(victim.name):
                grown = (*chosen, victim)
                if not chosen or self._could_win(grown):
                    self._grow(grown, place + 1)

    def _spare(self, name: ModelName) -> int:
        """Return how many replicas of a model may stop."""
        return live_replicas(self._situation, name) - self._situation.view.models[name].min_replicas

    def _could_win(self, chosen: tuple[Victim, ...]) -> bool:
        return self._limit is None or self._rank(chosen, ()) < self._limit

    def _rank(self, chosen: tuple[Victim, ...], moves: tuple[Move, ...], moves_seconds: float = 0.0) -> Rank:
        """Return the rank of an option of these victims, without making it; must agree with `rank`."""
        disturbance_seconds = _disturbance_seconds(chosen)
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

    def _rank_alone(self, victim: Victim, wait_seconds: float) -> Rank:
        """Return the same of a single one; every victim of a node is asked for it."""
        disturbance_seconds = victim.disturbance_seconds
        cost_seconds = self._total_seconds(wait_seconds) + self._weight * disturbance_seconds
        step = int(cost_seconds / self._situation.policy.tie_seconds)
        return (step, 1, disturbance_seconds, -self._preferred, cost_seconds, self._node.node_id)

    def _total_seconds(self, wait_seconds: float) -> float:
        estimate = self._estimate
        return wait_seconds + estimate.worker_seconds + self._loaded_seconds + estimate.overhead_seconds

    def _take(self, chosen: tuple[Victim, ...]) -> None:
        movers = [victim for victim in chosen if victim.moves]
        if movers:
            moves_seconds = 0.0
            for mover in movers:
                least_seconds = self._destinations.least_seconds(mover.name)
                if least_seconds is None:
                    return
                moves_seconds = max(moves_seconds, least_seconds + mover.move_seconds)
            if self._limit is not None and self._rank(chosen, (), moves_seconds) >= self._limit:
                return
        self._assign(chosen, movers, ())

    def _assign(self, chosen: tuple[Victim, ...], movers: list[Victim], moves: tuple[Move, ...]) -> None:
        """Give each mover a destination that no other mover takes, over all combinations that could win."""
        ranked = self._rank(chosen, moves)
        if self._limit is not None and ranked >= self._limit:
            return
        if len(moves) == len(movers):
            self._chosen, self._moves, self._limit = chosen, moves, ranked
            return
        mover = movers[len(moves)]
        for destination in self._destinations.best(mover.name, self._node.node_id, len(movers)):
            move = self._move(mover, destination, moves)
            if move is not None:
                self._assign(chosen, movers, (*moves, move))

    def _move(self, mover: Victim, destination: Option, moves: tuple[Move, ...]) -> Move | None:
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
        return make_move(
            replica_id=mover.reservation.replica_id,
            model=model.name,
            to_node_id=node.node_id,
            to_devices=devices,
            estimate=destination.estimate,
            seconds=mover.move_seconds,
        )

    def _option(self, chosen: tuple[Victim, ...], moves: tuple[Move, ...]) -> Option:
        """Return the option of these victims; movers without a destination yet count their least."""
        situation, node = self._situation, self._node
        leaving = tuple([victim.reservation for victim in chosen])
        wanted = situation.wanted
        free = free_slots(wanted, situation.index.summaries[node.node_id], leaving)
        estimate = self._estimate
        return make_option(
            node_id=node.node_id,
            devices=tuple(sorted(free[: wanted.slots])),
            victims=tuple(sorted([each.replica_id for each in leaving])),
            estimate=make_estimate(
                worker_seconds=estimate.worker_seconds,
                stage_seconds=estimate.stage_seconds,
                skeleton_seconds=estimate.skeleton_seconds,
                first_forward_seconds=estimate.first_forward_seconds,
                stop_seconds=_wait_seconds(chosen, moves),
                overhead_seconds=estimate.overhead_seconds,
                tier=estimate.tier,
            ),
            disturbance_seconds=_disturbance_seconds(chosen),
            moves=tuple(sorted(moves, key=lambda move: move.replica_id)),
            drained=frozenset([victim.reservation.replica_id for victim in chosen if victim.drains]),
            preferred=self._preferred,
            weight=self._weight,
        )


def _disturbance_seconds(chosen: tuple[Victim, ...]) -> float:
    """Return what the victims together cost others: the same sum in whatever order they were chosen."""
    if len(chosen) == 1:
        return chosen[0].disturbance_seconds
    return sum(sorted([victim.disturbance_seconds for victim in chosen]))


def _wait_seconds(chosen: tuple[Victim, ...], moves: tuple[Move, ...]) -> float:
    """Return when the last of the victims is gone: they go at the same time."""
    seconds = 0.0
    for victim in chosen:
        seconds = max(seconds, victim.wait_seconds)
    for move in moves:
        seconds = max(seconds, move.estimate.total_seconds + move.seconds)
    return seconds
