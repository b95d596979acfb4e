"""Replicas with more sessions than they should have, and which of these go where. Pure.

A replica is crowded while more sessions are on it than its *places* (the model's concurrency target, or its
batch where that is smaller), or while some wait for a place in its batch. Rules:

1. Sessions go to a ready replica of the same weights whose results are equal to the bit (`numerics`), on an
   open node, that takes contexts as long, has places free and nobody waiting.
2. So many go as are too many here, as are free there, and as leave no more there than here: the sum of
   squares of the counts falls with every move, so that no session comes back while the load stays the same.
3. Only when it is worth it. How long a crowd will last is not known, so it is taken to last as long again as
   it has lasted (ski rental: whoever waits until waiting has cost as much as moving pays at most twice the
   best): it must have lasted `hysteresis_ratio` times what moving one of its sessions takes, and
   `crowded_seconds` at least.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from services.controller.cluster_view.fleet import Member, Standing, is_leaving, member, members_of
from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.moves import move_seconds
from services.controller.cluster_view.view import Model, Policy, Replica, Scheduling, View
from stoker.ids import ModelName, NodeId, ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """Move some sessions of a replica to another one of its model; both stay.

    Attributes:
        model: Whose.
        replica_id: Where they run, or wait.
        node_id: Its node.
        to_replica_id: Where they go.
        to_node_id: That one's node.
        sessions: At most so many; ≥ 1.
        crowded_seconds: How long there have been too many.
        cost_seconds: What moving these is expected to take.
    """

    model: ModelName
    replica_id: ReplicaId
    node_id: NodeId
    to_replica_id: ReplicaId
    to_node_id: NodeId
    sessions: int
    crowded_seconds: float
    cost_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a shift must keep to.

    Attributes:
        crowded_seconds: A crowd must have lasted for at least this.
        hysteresis_ratio: And for this many times what moving one of its sessions takes.
        sessions_per_node: Sessions on their way from or to one node at a time.
        busy: Replicas that sessions are on their way from or to: left alone.
        give_not: Replicas that took sessions lately: they give none.
        take_not: Replicas that gave sessions lately: they take none.
        on_their_way: Sessions by node, from there and to there.
        most: Shifts at a time.
    """

    crowded_seconds: float
    hysteresis_ratio: float
    sessions_per_node: int
    busy: frozenset[ReplicaId]
    give_not: frozenset[ReplicaId]
    take_not: frozenset[ReplicaId]
    on_their_way: Mapping[NodeId, int]
    most: int


class Crowd(NamedTuple):
    """A crowded replica, and what its node says of it."""

    source: Member
    replica: Replica


def crowded(view: View) -> list[Crowd]:
    """Return the crowded replicas of models with several; by model, then id."""
    index, found = index_of(view), []
    for name, tally in index.tallies.items():
        model = view.models.get(name)
        if model is None or tally.live < 2 or not (tally.waiting or tally.sessions > model.concurrency):  # noqa: PLR2004 - several
            continue
        for replica_id in index.of_model.get(name, ()):
            reservation = view.reservations[replica_id]
            node = view.nodes.get(reservation.node_id)
            replica = node.replicas.get(replica_id) if node is not None else None
            if replica is None or _too_many(model, replica) <= 0:
                continue  # most: told before anything is made of them
            one = member(view, reservation)
            if _serving(view, one) is not None:
                found.append(Crowd(one, replica))
    found.sort(key=lambda crowd: (crowd.source.reservation.model, crowd.replica.replica_id))
    return found


def shifts(  # noqa: PLR0913, PLR0917 - what a decision is made of
    view: View,
    crowds: Iterable[Crowd],
    since_seconds: Mapping[ReplicaId, float],
    now_seconds: float,
    policy: Policy,
    bounds: Bounds,
) -> tuple[Shift, ...]:
    """Return what is worth moving now, the longest crowds first.

    Args:
        view: The cluster.
        crowds: Its crowded replicas.
        since_seconds: Of the crowded replicas: since when they are.
        now_seconds: The view's clock.
        policy: Constants.
        bounds: What must be kept to.
    """
    still = bounds.busy | bounds.give_not
    found = [crowd for crowd in crowds if crowd.replica.replica_id not in still]
    found.sort(
        key=lambda crowd: (
            since_seconds[crowd.replica.replica_id],
            -crowd.replica.waiting_sessions,
            crowd.replica.replica_id,
        )
    )
    chosen: list[Shift] = []
    taken = set(bounds.busy)
    room = dict(bounds.on_their_way)
    for source, replica in found:
        if len(chosen) >= bounds.most:
            break
        age_seconds = now_seconds - since_seconds[replica.replica_id]
        shift = _shift(view, source, replica, age_seconds, taken, room, policy, bounds)
        if shift is not None:
            chosen.append(shift)
            taken |= {shift.replica_id, shift.to_replica_id}
            for node_id in (shift.node_id, shift.to_node_id):
                room[node_id] = room.get(node_id, 0) + shift.sessions
    return tuple(chosen)


def _shift(  # noqa: PLR0913, PLR0917 - what a decision is made of
    view: View,
    source: Member,
    replica: Replica,
    age_seconds: float,
    taken: Iterable[ReplicaId],
    room: Mapping[NodeId, int],
    policy: Policy,
    bounds: Bounds,
) -> Shift | None:
    name = source.reservation.model
    model = view.models[name]
    tokens = replica.context_tokens // max(1, replica.sessions - replica.waiting_sessions)
    one_seconds = move_seconds(view, name, tokens, policy)
    if age_seconds < max(bounds.crowded_seconds, bounds.hysteresis_ratio * one_seconds):
        return None
    target = _target(view, source, replica, {*taken, *bounds.take_not})
    if target is None:
        return None
    to, other = target
    node_id, to_node_id = source.reservation.node_id, to.reservation.node_id
    ways = {node_id: 1, to_node_id: 1} if node_id != to_node_id else {node_id: 2}
    allowed = min((bounds.sessions_per_node - room.get(each, 0)) // count for each, count in ways.items())
    count = min(
        _too_many(model, replica),
        _places(model, other) - other.sessions,
        (replica.sessions - other.sessions) // 2,
        allowed,
    )
    if count < 1:
        return None
    return Shift(
        model=name,
        replica_id=replica.replica_id,
        node_id=node_id,
        to_replica_id=other.replica_id,
        to_node_id=to_node_id,
        sessions=count,
        crowded_seconds=age_seconds,
        cost_seconds=move_seconds(view, name, tokens * count, policy),
    )


def _target(
    view: View, source: Member, replica: Replica, but_not: Iterable[ReplicaId]
) -> tuple[Member, Replica] | None:
    """Return the emptiest replica that could take some of these sessions; None = there is none."""
    passed_over = {replica.replica_id, *but_not}
    model = view.models[source.reservation.model]
    found = [
        (to, other)
        for to in members_of(view, source.reservation.model)
        if to.reservation.replica_id not in passed_over
        and (other := _serving(view, to)) is not None
        and _goes_on_there(replica, other)
        and not other.waiting_sessions
        and _places(model, other) > other.sessions
        and view.scheduling.get(to.reservation.node_id, Scheduling.OPEN) is Scheduling.OPEN
    ]
    return min(
        found,
        key=lambda pair: (pair[1].sessions / _places(model, pair[1]), pair[1].replica_id),
        default=None,
    )


def _serving(view: View, found: Member) -> Replica | None:
    """Return the replica's report if it serves, stays, and its node can be told something now."""
    replica, node = found.replica, found.node
    if replica is None or node is None or not node.connected or found.standing is not Standing.READY:
        return None
    reservation = found.reservation
    if (
        found.stale
        or replica.loading
        or reservation.moving_to is not None
        or reservation.replica_id in view.distrusted
        or is_leaving(view, found)
    ):
        return None
    return replica


def _goes_on_there(here: Replica, there: Replica) -> bool:
    """Tell whether a session here could go on there with the same bytes, whatever its length."""
    same_weights = here.revision is None or there.revision is None or here.revision == there.revision
    same_bits = here.numerics == there.numerics
    long_enough = not there.max_context_tokens or here.max_context_tokens <= there.max_context_tokens
    return same_weights and same_bits and long_enough


def _places(model: Model, replica: Replica) -> int:
    """Return how many sessions the replica should have at most."""
    target = max(1, model.concurrency)
    return min(target, replica.max_batch) if replica.max_batch else target


def _too_many(model: Model, replica: Replica) -> int:
    return max(replica.sessions - _places(model, replica), replica.waiting_sessions)
