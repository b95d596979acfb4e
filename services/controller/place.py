"""Where a model should start: `place(view, name, now_seconds, policy) -> Decision`, pure.

The decision, in this order:

1. A node can never take the model (its engines don't know the architecture; a device or the pool is too
   small): it is out. All nodes are: `Unplaceable`, with every node's reason.
2. A node has free slots and room in its pool: an option at its estimated start time.
3. A node has not, but idle replicas there can be stopped: an option at the estimate plus the time to stop,
   and the victims' worth (the time to bring them back, likely soon or not) counts against it.
4. The smallest sum wins; within `tie_seconds` the smaller disturbance does, then the node's name.
5. No option: `Wait`, and why. Room that is being made already is waited for, never made twice.

Migrating running replicas will be one more kind of option (DESIGN section 5, option 3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from services.controller.estimate import Estimate, start_estimate
from services.controller.fleet import Member, Standing, is_idle
from services.controller.room import (
    Never,
    Situation,
    devices_needed,
    enough,
    free_devices,
    never_fits,
    on_node,
    pool_has_room,
    situation_of,
)
from services.controller.view import Model, Node, Policy, View
from stoker.ids import ModelName, NodeId, ReplicaId
from stoker.units import format_bytes

MAX_REASONS = 5
"""Nodes named in a message; the rest are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to start the model.

    Attributes:
        node_id: Where.
        devices: Slots it would get; those of its victims included.
        victims: Idle replicas to stop first, sorted.
        estimate: Until ready.
        disturbance_seconds: What stopping the victims is expected to cost others.
    """

    node_id: NodeId
    devices: tuple[int, ...]
    victims: tuple[ReplicaId, ...]
    estimate: Estimate
    disturbance_seconds: float

    @property
    def cost_seconds(self) -> float:
        """What options are compared by."""
        return self.estimate.total_seconds + self.disturbance_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Reserve these slots and order the start."""

    node_id: NodeId
    devices: tuple[int, ...]
    estimate: Estimate
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StopIdle:
    """Stop these replicas, if they are still idle then; decide again once their slots are free."""

    node_id: NodeId
    victims: tuple[ReplicaId, ...]
    estimate: Estimate
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing can be done now; decide again on the next change, at `retry_at_seconds` at the latest."""

    reason: str
    retry_at_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplaceable:
    """No node of this cluster can ever take it; `code` names the error, `reasons` has one per node."""

    code: str
    reasons: tuple[str, ...]


Decision = Placed | StopIdle | Wait | Unplaceable


def place(
    view: View, name: ModelName, now_seconds: float, policy: Policy, *, may_disturb: bool = True
) -> Decision:
    """Decide where one more replica of a model starts.

    Args:
        view: The cluster; `name` must be deployed in it.
        name: The model.
        now_seconds: The view's clock.
        policy: Constants.
        may_disturb: Idle replicas of other models may be stopped for it.
    """
    situation = situation_of(view, name, now_seconds, policy)
    nodes = [view.nodes[node_id] for node_id in sorted(view.nodes)]
    nevers = {node.node_id: never for node in nodes if (never := never_fits(situation.model, node))}
    candidates = [node for node in nodes if node.node_id not in nevers]
    if nodes and not candidates:
        return _unplaceable(situation.model, nevers)
    open_nodes = [node for node in candidates if node.connected and node.reachable and not node.draining]
    options = [option for node in open_nodes if (option := _free_option(situation, node))]
    making_room = [node for node in open_nodes if _room_is_being_made(situation, node)]
    if may_disturb and not making_room:
        options += [option for node in open_nodes if (option := _stop_option(situation, node))]
    best = _best(options, policy)
    if best is None:
        return _wait(situation, open_nodes, making_room, candidates)
    shown = tuple(sorted(options, key=lambda option: (option.cost_seconds, option.node_id, option.victims)))
    if best.victims:
        return StopIdle(node_id=best.node_id, victims=best.victims, estimate=best.estimate, options=shown)
    return Placed(node_id=best.node_id, devices=best.devices, estimate=best.estimate, options=shown)


def _estimate(situation: Situation, node: Node, stop_seconds: float = 0.0) -> Estimate:
    return start_estimate(
        situation.model,
        node,
        measured=situation.view.measured.get(situation.model.name, ()),
        loading_bytes=situation.loading_bytes.get(node.node_id, 0),
        starting_workers=situation.starting_workers.get(node.node_id, 0),
        stop_seconds=stop_seconds,
    )


def _free_option(situation: Situation, node: Node) -> Option | None:
    free = free_devices(situation, node)
    needed = devices_needed(situation.model, node)
    if len(free) < needed or not pool_has_room(situation, node):
        return None
    return Option(
        node_id=node.node_id,
        devices=free[:needed],
        victims=(),
        estimate=_estimate(situation, node),
        disturbance_seconds=0.0,
    )


def _stop_option(situation: Situation, node: Node) -> Option | None:
    """Return the option that stops the cheapest idle replicas, where the node has no room without."""
    if enough(situation, node, ()):
        return None
    worth = {
        found.reservation.replica_id: _worth_seconds(situation, node, found)
        for found in on_node(situation, node)
        if _may_go(situation, found)
    }
    cheapest = sorted(
        (found for found in on_node(situation, node) if found.reservation.replica_id in worth),
        key=lambda found: (worth[found.reservation.replica_id], found.reservation.replica_id),
    )
    victims = _fewest(situation, node, cheapest)
    if not victims:
        return None
    devices = free_devices(situation, node, victims)[: devices_needed(situation.model, node)]
    return Option(
        node_id=node.node_id,
        devices=devices,
        victims=tuple(sorted(victim.reservation.replica_id for victim in victims)),
        estimate=_estimate(situation, node, situation.policy.stop_seconds),
        disturbance_seconds=sum(worth[victim.reservation.replica_id] for victim in victims),
    )


def _fewest(situation: Situation, node: Node, cheapest: list[Member]) -> tuple[Member, ...]:
    """Take victims from the cheapest on until there is room, then spare each one that was not needed."""
    victims: tuple[Member, ...] = ()
    left = Counter(situation.live)
    for found in cheapest:
        model = situation.view.models[found.reservation.model]
        if left[model.name] <= model.min_replicas:
            continue
        left[model.name] -= 1
        victims = (*victims, found)
        if enough(situation, node, victims):
            break
    else:
        return ()
    for found in reversed(victims):
        without = tuple(victim for victim in victims if victim is not found)
        if without and enough(situation, node, without):
            victims = without
    return victims


def _may_go(situation: Situation, found: Member) -> bool:
    """Tell whether this replica may be stopped for another model now."""
    name = found.reservation.model
    return (
        is_idle(found)
        and name != situation.model.name
        and name in situation.view.models
        and name not in situation.view.demands
        and _residency_ends_seconds(found, situation.policy) <= situation.now_seconds
    )


def _residency_ends_seconds(found: Member, policy: Policy) -> float:
    ready_since_seconds = found.replica.ready_since_seconds if found.replica else None
    return (ready_since_seconds or 0.0) + policy.minimum_residency_seconds


def _worth_seconds(situation: Situation, node: Node, victim: Member) -> float:
    """Return what losing an idle replica is expected to cost: its restart, by how likely it is wanted soon.

    The chance that it is asked for again falls with the time since it last was, as in cost-aware caches
    (GreedyDual, Landlord): one over the idle seconds, at most 1.
    """
    model = situation.view.models[victim.reservation.model]
    restart = start_estimate(
        model,
        node,
        measured=situation.view.measured.get(model.name, ()),
        loading_bytes=0,
        starting_workers=0,
    )
    idle_since_seconds = victim.replica.idle_since_seconds if victim.replica else None
    idle_seconds = situation.now_seconds - (idle_since_seconds or situation.now_seconds)
    return restart.total_seconds / max(1.0, idle_seconds)


def _best(options: list[Option], policy: Policy) -> Option | None:
    if not options:
        return None
    limit_seconds = min(option.cost_seconds for option in options) + policy.tie_seconds
    ties = [option for option in options if option.cost_seconds <= limit_seconds]
    return min(
        ties,
        key=lambda option: (
            len(option.victims),
            option.disturbance_seconds,
            option.cost_seconds,
            option.node_id,
        ),
    )


def _room_is_being_made(situation: Situation, node: Node) -> bool:
    """Tell whether replicas on their way out will leave enough room, and for this model."""
    leaving = tuple(
        found
        for found in on_node(situation, node)
        if found.standing is Standing.STOPPING
        and found.reservation.stopping_for in (None, situation.model.name)
        and found.reservation.model in situation.view.models
    )
    return bool(leaving) and not enough(situation, node, ()) and enough(situation, node, leaving)


def _wait(
    situation: Situation, open_nodes: list[Node], making_room: list[Node], candidates: list[Node]
) -> Wait:
    if making_room:
        return Wait(reason=f"{making_room[0].node_id} is stopping a replica to make room")
    if not candidates:
        return Wait(reason="no node has joined the cluster yet: is a node agent running?")
    if not open_nodes:
        return Wait(reason="every node that could take it is draining or does not answer")
    residencies = [
        ends_seconds
        for node in open_nodes
        for found in on_node(situation, node)
        if is_idle(found)
        and (ends_seconds := _residency_ends_seconds(found, situation.policy)) > situation.now_seconds
    ]
    busy = "; ".join(_busy(situation, node) for node in open_nodes[:MAX_REASONS])
    more = f"; and {len(open_nodes) - MAX_REASONS} more nodes" if len(open_nodes) > MAX_REASONS else ""
    return Wait(reason=f"no free room: {busy}{more}", retry_at_seconds=min(residencies, default=None))


def _busy(situation: Situation, node: Node) -> str:
    free = free_devices(situation, node)
    if len(free) >= devices_needed(situation.model, node):
        return (
            f"{node.node_id}: {format_bytes(node.pool.leased_bytes)} of the pool's "
            f"{format_bytes(node.pool.total_bytes)} are in use"
        )
    models = sorted({found.reservation.model for found in on_node(situation, node)})
    return f"{node.node_id}: its {len(node.devices)} slots serve {', '.join(models[:MAX_REASONS])}"


def _unplaceable(model: Model, nevers: Mapping[NodeId, Never]) -> Unplaceable:
    codes = {never.code for never in nevers.values()}
    reasons = [nevers[node_id].reason for node_id in sorted(nevers)]
    shown = reasons[:MAX_REASONS]
    if len(reasons) > MAX_REASONS:
        shown.append(f"and {len(reasons) - MAX_REASONS} more nodes")
    code = codes.pop() if len(codes) == 1 else "does_not_fit"
    return Unplaceable(code=code, reasons=(f"no node can serve {model.name}", *shown))
