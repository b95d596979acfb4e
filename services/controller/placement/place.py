"""Where a model should start: `place(view, name, now_seconds, policy) -> Decision`, pure.

The decision, in this order:

1. A node can never take the model (its engines don't know the architecture, a device or the pool is too
   small, a required label is missing): it is out. All nodes are: `Unplaceable`, with every node's reason.
2. A node has free slots and room in its pool: an option at its estimated start time.
3. A node has not, but could have: idle replicas there are stopped, running ones moved to where there is room
   (`may_migrate`), or, for who has waited beyond `waiting_bound_seconds`, drained. Of all sets of victims
   the cheapest (`options`), their worth counted `hysteresis_ratio` times against it.
4. The smallest sum wins; in equal steps of `tie_seconds` the smaller disturbance does, then the node with
   more preferred labels, then the node's name. A pinned model's replicas are never victims.
5. No option: `Wait`, and why. Room that is being made already is waited for, never made twice: for a model
   that lacks several replicas as many rooms are made at a time (`rooms_at_once`), for one of several devices
   one.

Nodes are looked at best first until no other can be better (`search`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from services.controller.cluster_view.estimate import Estimate
from services.controller.cluster_view.frozen import maker_of
from services.controller.cluster_view.streaming import copy_bytes_on
from services.controller.cluster_view.traits import ANYBODY
from services.controller.cluster_view.view import Model, Node, Policy, View
from services.controller.placement.options import Move, Option
from services.controller.placement.room import (
    Never,
    Situation,
    can_ever,
    free_slots,
    host_has_room,
    never_fits,
    on_node,
    rooms_being_made,
    situation_of,
)
from services.controller.placement.search import search
from stoker.ids import ModelName, NodeId, ReplicaId
from stoker.units import format_bytes

MAX_REASONS = 5
"""Nodes named in a message; the rest are counted."""
NO_ROOM = "no free room"
MAX_RESIDENCIES = 64
"""Nodes asked when their idle replicas may go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Reserve these slots and order the start."""

    node_id: NodeId
    devices: tuple[int, ...]
    estimate: Estimate
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopIdle:
    """Stop these replicas, if they are still idle then; decide again once their slots are free.

    Those in `drained` serve sessions: they are drained because who waits has waited beyond the bound.
    """

    node_id: NodeId
    victims: tuple[ReplicaId, ...]
    estimate: Estimate
    options: tuple[Option, ...]
    drained: frozenset[ReplicaId] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrate:
    """Move these replicas, and stop those other victims; decide again once their slots are free."""

    node_id: NodeId
    moves: tuple[Move, ...]
    victims: tuple[ReplicaId, ...]
    estimate: Estimate
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing can be done now; decide again on the next change, at `retry_at_seconds` at the latest.

    Attributes:
        reason: Says nothing that changes while nothing is decided.
        details: What it is like now, for an explanation.
        retry_at_seconds: When time alone may have made room; None = never.
        room_for: Room is being made for so many replicas, and who lacks more may have more made; 0 = no more
            can be made now.
    """

    reason: str
    details: tuple[str, ...] = ()
    retry_at_seconds: float | None = None
    room_for: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplaceable:
    """No node of this cluster can ever take it; `code` names the error, `reasons` has one per node."""

    code: str
    reasons: tuple[str, ...]


Decision = Placed | StopIdle | Migrate | Wait | Unplaceable
_make_placed, _make_stop_idle, _make_migrate = maker_of(Placed), maker_of(StopIdle), maker_of(Migrate)


def place(  # noqa: PLR0913 - what a decision is made of, each named by its caller
    view: View,
    name: ModelName,
    now_seconds: float,
    policy: Policy,
    *,
    may_disturb: bool = True,
    lacking: int = 1,
    exhaustive: bool = False,
) -> Decision:
    """Decide where one more replica of a model starts.

    Args:
        view: The cluster; `name` must be deployed in it.
        name: The model.
        now_seconds: The view's clock.
        policy: Constants.
        may_disturb: Replicas of other models may be stopped or moved for it.
        lacking: How many replicas it wants beyond those it has or is getting, at least this one.
        exhaustive: Look at every node: the same choice, slowly; every option is in the answer.
    """
    lacking = min(lacking, policy.rooms_at_once)
    situation = situation_of(view, name, now_seconds, policy, may_disturb=may_disturb, lacking=lacking)
    if view.nodes and not _some_node_fits(situation):
        return _unplaceable(situation)
    making_room, rooms = _making_room(situation)
    if rooms >= lacking or (rooms and situation.wanted.slots > 1):
        situation = situation_of(view, name, now_seconds, policy, may_disturb=False)
    if not situation.may_disturb and not situation.index.free_nodes:
        return _wait(situation, making_room, rooms)  # no node has room, and nobody is to make some
    found = search(situation, exhaustive=exhaustive)
    best = found.best
    if best is None:
        return _wait(situation, making_room, rooms)
    if best.moves:
        moved = {move.replica_id for move in best.moves}
        return _make_migrate(
            node_id=best.node_id,
            moves=best.moves,
            victims=tuple(victim for victim in best.victims if victim not in moved),
            estimate=best.estimate,
            options=found.options,
        )
    if best.victims:
        return _make_stop_idle(
            node_id=best.node_id,
            victims=best.victims,
            estimate=best.estimate,
            options=found.options,
            drained=best.drained,
        )
    return _make_placed(
        node_id=best.node_id, devices=best.devices, estimate=best.estimate, options=found.options
    )


def _some_node_fits(situation: Situation) -> bool:
    """Tell whether any node could ever take the model: by shape, because nodes share theirs."""
    wanted, index, nodes = situation.wanted, situation.index, situation.view.nodes
    required = wanted.model.required_labels
    if not required:
        return any(map(wanted.slots_that_fit, index.shapes))
    carriers = min((tuple(index.labelled.get(label, ())) for label in required), key=len)
    return any(can_ever(wanted, nodes[node_id], index.summaries[node_id]) for node_id in carriers)


def _making_room(situation: Situation) -> tuple[NodeId | None, int]:
    """Return the first node on which replicas on their way out leave room, and for how many of the model."""
    index, nodes = situation.index, situation.view.nodes
    leaving: set[NodeId] = {*index.leaving.get(ANYBODY, ()), *index.leaving.get(situation.model.name, ())}
    first, rooms = None, 0
    for node_id in sorted(leaving):
        node, summary = nodes[node_id], index.summaries[node_id]
        if summary.is_open and can_ever(situation.wanted, node, summary):
            here = rooms_being_made(situation, node)
            if here and first is None:
                first = node_id
            rooms += here
    return first, rooms


def _wait(situation: Situation, making_room: NodeId | None, rooms: int) -> Wait:
    if making_room is not None:
        reason = f"{making_room} is stopping a replica to make room"
        if not situation.may_disturb:
            return Wait(reason=reason, room_for=rooms if situation.wanted.slots == 1 else 0)
        return Wait(reason=reason, retry_at_seconds=_retry_at_seconds(situation))
    if not situation.view.nodes:
        return Wait(reason="no node has joined the cluster yet: is a node agent running?")
    nodes = situation.view.nodes
    fitting = (
        nodes[node_id]
        for node_id in situation.index.open_nodes
        if never_fits(situation.model, nodes[node_id]) is None
    )
    named = list(islice(fitting, MAX_REASONS))
    if not named:
        return Wait(reason="every node that could take it is draining or does not answer")
    details: list[str] = []
    refusal = situation.view.refusals.get(situation.model.name)
    if refusal is None or refusal.reason != NO_ROOM:  # else it was said when the wait began
        details = [_busy(situation, node) for node in named]
        more_nodes = len(situation.index.open_nodes) - len(named)
        if more_nodes > 0:
            details.append(f"and {more_nodes} more nodes")
    return Wait(reason=NO_ROOM, details=tuple(details), retry_at_seconds=_retry_at_seconds(situation))


def _retry_at_seconds(situation: Situation) -> float | None:
    """Return when a residency ends, or a bound on waiting is reached; None = neither helps.

    Where more nodes could be asked than are, no later than the longest residency that may have begun.
    """
    now_seconds, policy, index = situation.now_seconds, situation.policy, situation.index
    stays = [policy.minimum_residency_seconds]
    if situation.waited_too_long and not policy.may_migrate:
        stays.append(policy.waiting_bound_seconds)
    lists = [index.idle_by_worth]
    if (policy.may_migrate or situation.waited_too_long) and "disk" in index.busy_by_rate:
        lists.append(index.busy_by_rate["disk"])
    moments = [
        ready_seconds + stay
        for nodes in lists
        for _, node_id in islice(nodes, MAX_RESIDENCIES)
        for ready_seconds in index.summaries[node_id].settling
        for stay in stays
    ]
    if any(len(nodes) > MAX_RESIDENCIES for nodes in lists):
        moments.append(now_seconds + policy.minimum_residency_seconds)
    demand = situation.view.demands.get(situation.model.name)
    if demand is not None:
        moments.append(demand.since_seconds + policy.waiting_bound_seconds + policy.tie_seconds)
    return min((moment for moment in moments if moment > now_seconds), default=None)


def _busy(situation: Situation, node: Node) -> str:
    free = free_slots(situation.wanted, situation.index.summaries[node.node_id])
    needed = situation.wanted.slots
    copied_bytes = copy_bytes_on(situation.model, node)
    if len(free) >= needed and copied_bytes and not host_has_room(situation, node, (), copied_bytes):
        return f"{node.node_id}: its memory is taken by its pool, and copies of models larger than that"
    if len(free) >= needed:
        return (
            f"{node.node_id}: {format_bytes(node.pool.leased_bytes)} of the pool's "
            f"{format_bytes(node.pool.total_bytes)} are in use"
        )
    models = sorted({found.reservation.model for found in on_node(situation, node)})
    some = f" ({len(free)} free, {needed} needed)" if free else ""
    return f"{node.node_id}: its {len(node.devices)} slots serve {', '.join(models[:MAX_REASONS])}{some}"


def _unplaceable(situation: Situation) -> Unplaceable:
    model: Model = situation.model
    nodes: Mapping[NodeId, Node] = situation.view.nodes
    nevers: Iterable[Never | None] = (never_fits(model, nodes[node_id]) for node_id in sorted(nodes))
    found = [never for never in nevers if never is not None]
    codes = {never.code for never in found}
    shown = [never.reason for never in found[:MAX_REASONS]]
    if len(found) > MAX_REASONS:
        shown.append(f"and {len(found) - MAX_REASONS} more nodes")
    code = codes.pop() if len(codes) == 1 else "does_not_fit"
    return Unplaceable(code=code, reasons=(f"no node can serve {model.name}", *shown))
