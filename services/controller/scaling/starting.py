"""Rules for what must come: who wants a replica, in which order, and what is done to get it one. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from services.controller.cluster_view.attention import EMPTY, asked_for
from services.controller.cluster_view.events import ForecastMissed
from services.controller.cluster_view.fleet import Member, Standing, is_leaving
from services.controller.cluster_view.forecast import prewarm_window_seconds
from services.controller.cluster_view.view import Model, Policy, Replica
from services.controller.placement.options import Move
from services.controller.placement.outcome import outcome
from services.controller.placement.place import (
    Decision,
    Migrate,
    Placed,
    StopIdle,
    Unplaceable,
    Wait,
    place,
)
from services.controller.placement.together import MAX_TOGETHER, Ask, order_together
from services.controller.scaling.actions import Migrate as MigrateAction
from services.controller.scaling.actions import Note, Start, Stop
from services.controller.scaling.planner import Planner
from services.controller.scaling.stopping import LIVE
from stoker.ids import ModelName, NodeId, ReplicaId

MAX_BATCHES = 4
"""Groups of `MAX_TOGETHER` models ordered jointly in one pass; the others come in order of waiting."""


def start_what_is_wanted(planner: Planner, names: Iterable[ModelName]) -> None:
    """Give each of these models the replica it wants, who waits longest first."""
    looked = set(names)
    wanting = [name for name in sorted(looked) if _wants(planner, name) and not _rests(planner, name)]
    cold = {name for name in wanting if not _is_warm(planner, name)}
    wanting.sort(key=lambda name: (*_urgency(planner, name, cold), name))
    asked = [name for name in wanting if _urgency(planner, name, cold)[0] == 0]
    _start_together(planner, asked, cold)
    for name in wanting[len(asked) :]:
        _start_unless_it_still_waits(planner, name, cold)
    _start_more(planner, asked, cold)
    for name in sorted(name for name in looked - set(wanting) if name in planner.view.refusals):
        planner.lift(name)


def _start_together(planner: Planner, names: Iterable[ModelName], cold: set[ModelName]) -> None:
    """Start one replica of each, the order chosen jointly for so many at a time (`together`)."""
    asks = []
    for name in names:
        terms = _terms(planner, name, cold)
        if not _still_waits(planner, name, terms):
            asks.append(
                Ask(
                    name=name,
                    policy=terms.policy,
                    may_disturb=terms.may_disturb,
                    lacking=lacking(planner, name),
                )
            )
    for first in range(0, len(asks), MAX_TOGETHER):
        batch = asks[first : first + MAX_TOGETHER]
        if first < MAX_BATCHES * MAX_TOGETHER:
            batch = list(order_together(planner.view, batch, planner.now_seconds))
        for ask in batch:
            _start_unless_it_still_waits(planner, ask.name, cold)


def _start_more(planner: Planner, names: Iterable[ModelName], cold: set[ModelName]) -> None:
    """Give models that requests wait for one more replica each, in turn, while there is room.

    Nobody gets a second one before everybody was looked at for a first one.
    """
    names = list(names)
    while names:
        started = []
        for name in names:
            actions = len(planner.actions)
            if _wants(planner, name):
                _start_unless_it_still_waits(planner, name, cold)
                if any(not isinstance(action, Note) for action in planner.actions[actions:]):
                    started.append(name)
        names = started


def _start_unless_it_still_waits(planner: Planner, name: ModelName, cold: set[ModelName]) -> None:
    """Start one more, unless nothing has changed since that was refused."""
    terms = _terms(planner, name, cold)
    if not _still_waits(planner, name, terms):
        _start(planner, name, terms)


def _still_waits(planner: Planner, name: ModelName, terms: _Terms) -> bool:
    return planner.still_waits(name, may_disturb=terms.may_disturb) and not lacks_more_room(planner, name)


def lacks_more_room(planner: Planner, name: ModelName) -> bool:
    """Tell whether room is being made for a model, but not for all replicas that it lacks by now."""
    refusal = planner.view.refusals.get(name)
    if refusal is None or not refusal.room_for:
        return False
    return refusal.room_for < min(lacking(planner, name), planner.policy.rooms_at_once)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """What may be done for a model that wants a replica.

    Attributes:
        policy: The constants of its decision.
        may_disturb: Replicas of others may be stopped or moved.
        again_seconds: When more may be done; None = never.
    """

    policy: Policy
    may_disturb: bool
    again_seconds: float | None


def _terms(planner: Planner, name: ModelName, cold: set[ModelName]) -> _Terms:
    """Return what may be done for a model now.

    Sessions that wait for a place in a batch may have idle replicas stopped at once: nobody uses them.
    Running ones are disturbed only for who has no replica, or has waited for `queue_age_seconds`.
    """
    starved = (name in cold and _is_asked_for(planner, name)) or _queues(planner, name)
    starved = starved or _loses_its_node(planner, name)
    since_seconds = _waiting_since_seconds(planner, name)
    policy, again_seconds = planner.policy, None
    if since_seconds is not None and not starved:
        policy = replace(policy, may_migrate=False)
        again_seconds = since_seconds + policy.queue_age_seconds
    return _Terms(
        policy=policy, may_disturb=starved or since_seconds is not None, again_seconds=again_seconds
    )


def _wants(planner: Planner, name: ModelName) -> bool:
    """Tell whether the model wants one more replica than it has or is getting."""
    return lacking(planner, name) > 0


def lacking(planner: Planner, name: ModelName) -> int:
    """Return how many replicas the model wants beyond those that it has or is getting; 0 or less = none."""
    model = planner.view.models.get(name)
    if model is None:
        return 0
    return _desired(planner, model, planner.members_of(name)) - _live(planner, name)


def _live(planner: Planner, name: ModelName) -> int:
    """Return how many replicas the model has or is getting."""
    tally = planner.index.tallies.get(name, EMPTY)
    if not tally.cares:
        return tally.live  # nobody is stale, or on its way elsewhere
    return sum(
        found.standing in LIVE
        and not found.stale
        and found.reservation.moving_to is None
        and not is_leaving(planner.view, found)
        for found in planner.members_of(name)
    )


def _desired(planner: Planner, model: Model, members: Iterable[Member]) -> int:
    asked = max(asked_for(planner.view, model), int(_is_expected(planner, model)))
    ready = [found.replica for found in members if found.replica and found.standing is Standing.READY]
    sessions = sum(replica.sessions for replica in ready)
    loaded = -(-sessions // model.concurrency)
    queued = len(ready) + 1 if _queues(planner, model.name) else 0
    return min(model.max_replicas, max(model.min_replicas, asked, loaded, queued))


def _queues(planner: Planner, name: ModelName) -> bool:
    """Tell whether sessions wait too long for a place in a ready replica's batch."""
    since_seconds = _waiting_since_seconds(planner, name)
    return since_seconds is not None and planner.is_over(since_seconds + planner.policy.queue_age_seconds)


def _waiting_since_seconds(planner: Planner, name: ModelName) -> float | None:
    """Return since when sessions wait for a place in a ready replica's batch; None = none does."""
    if not planner.index.tallies.get(name, EMPTY).waiting:
        return None
    since = [replica.waiting_since_seconds for replica in _ready(planner, name)]
    return min((moment for moment in since if moment is not None), default=None)


def _longest_since_seconds(planner: Planner, name: ModelName) -> float | None:
    """Return since when the session that has waited longest for such a place has waited for anything.

    Where no agent tells it is since when some have been seen to wait in that batch; None = none does.
    """
    if not planner.index.tallies.get(name, EMPTY).waiting:
        return None
    since = []
    for replica in _ready(planner, name):
        told_seconds, seen_seconds = replica.longest_since_seconds, replica.waiting_since_seconds
        since.append(seen_seconds if told_seconds is None else told_seconds)
    return min((moment for moment in since if moment is not None), default=None)


def _ready(planner: Planner, name: ModelName) -> list[Replica]:
    return [
        found.replica
        for found in planner.members_of(name)
        if found.standing is Standing.READY and found.replica is not None
    ]


def _is_expected(planner: Planner, model: Model) -> bool:
    """Tell whether the model's history says that it is asked for about now."""
    expected = prewarm_window_seconds(model, planner.view.arrivals.get(model.name))
    if expected is None or not planner.is_over(expected[0]):
        return False
    if planner.is_over(expected[1]):
        planner.note(ForecastMissed(model=model.name))
        return False
    return True


def _loses_its_node(planner: Planner, name: ModelName) -> bool:
    """Tell whether sessions run where no replica may stay: they need another one to move to."""
    return any(
        is_leaving(planner.view, found) and found.replica is not None and found.replica.sessions > 0
        for found in planner.members_of(name)
    )


def _is_asked_for(planner: Planner, name: ModelName) -> bool:
    return name in planner.view.demands or name in planner.view.always


def _is_warm(planner: Planner, name: ModelName) -> bool:
    return any(found.standing is Standing.READY for found in planner.members_of(name))


def _rests(planner: Planner, name: ModelName) -> bool:
    failure = planner.view.failures.get(name)
    return failure is not None and not planner.is_over(failure.retry_at_seconds)


def _urgency(planner: Planner, name: ModelName, cold: set[ModelName]) -> tuple[int, float]:
    """Return a model's class (0 = requests wait for it) and since when it waits, seconds."""
    demand = planner.view.demands.get(name)
    if demand is not None and name in cold:
        return (0, demand.urgent_since_seconds)
    since_seconds = _longest_since_seconds(planner, name)
    if since_seconds is not None:
        return (0, since_seconds)
    return (1 if name in planner.view.always else 2, 0.0)


def _start(planner: Planner, name: ModelName, terms: _Terms) -> None:
    decision = place(
        planner.view,
        name,
        planner.now_seconds,
        terms.policy,
        may_disturb=terms.may_disturb,
        lacking=lacking(planner, name),
    )
    planner.decisions.append((name, decision))
    match decision:
        case Placed():
            planner.lift(name)
            planner.actions.append(_start_action(planner, name, decision))
        case StopIdle():
            planner.actions += _stops(name, decision.node_id, decision.victims, decision.drained)
        case Migrate():
            planner.actions += [_move(planner, name, decision.node_id, move) for move in decision.moves]
            planner.actions += _stops(name, decision.node_id, decision.victims, frozenset())
        case Wait() | Unplaceable():
            pass
    for event in outcome(planner.view, name, decision, planner.now_seconds, new_id=planner.tentative_id):
        planner.fold(event)
    _say_why_it_waits(planner, name, decision, terms)


def _say_why_it_waits(planner: Planner, name: ModelName, decision: Decision, terms: _Terms) -> None:
    may_disturb = terms.may_disturb
    match decision:
        case StopIdle(node_id=node_id):
            planner.refuse(
                name, f"{node_id} is stopping a replica to make room", disturbs=may_disturb, room_for=1
            )
        case Migrate(node_id=node_id):
            planner.refuse(
                name, f"{node_id} is moving a replica away to make room", disturbs=may_disturb, room_for=1
            )
        case Wait(reason=reason, retry_at_seconds=retry_at_seconds, room_for=room_for):
            moments = [moment for moment in (retry_at_seconds, terms.again_seconds) if moment is not None]
            retry_at_seconds = min(moments, default=None)
            planner.refuse(
                name, reason, disturbs=may_disturb, retry_at_seconds=retry_at_seconds, room_for=room_for
            )
        case Unplaceable(code=code, reasons=reasons):
            planner.refuse(name, "; ".join(reasons), code, disturbs=may_disturb)
        case Placed():
            pass


def _stops(
    name: ModelName, node_id: NodeId, victims: Iterable[ReplicaId], drained: frozenset[ReplicaId]
) -> list[Stop]:
    return [
        Stop(
            replica_id=replica_id,
            node_id=node_id,
            only_if_idle=replica_id not in drained,
            reason=(
                f"{name} has waited too long for its room"
                if replica_id in drained
                else f"makes room for {name}"
            ),
            for_model=name,
        )
        for replica_id in victims
    ]


def _move(planner: Planner, name: ModelName, node_id: NodeId, move: Move) -> MigrateAction:
    """Start the replica anew where it goes to; its sessions follow once that is ready."""
    return MigrateAction(
        replica_id=move.replica_id,
        model=move.model,
        node_id=node_id,
        to_node_id=move.to_node_id,
        to_devices=move.to_devices,
        runtime=planner.view.models[move.model].runtime,
        estimate=move.estimate,
        move_seconds=move.seconds,
        for_model=name,
    )


def _start_action(planner: Planner, name: ModelName, placed: Placed) -> Start:
    return Start(
        model=name,
        node_id=placed.node_id,
        devices=placed.devices,
        runtime=planner.view.models[name].runtime,
        estimate=placed.estimate,
        options=placed.options,
    )
