"""A move that an operator wants: which of a model's replicas goes, and how. Pure.

1. The busiest ready replica that is not on the node goes.
2. To a replica of the model that is there or on its way there; else to one that is started on free slots.
Nobody else is disturbed for it: where there is no room it is refused.

One request's sessions go alone: their replica stays for the others, so the one that is started for them there
is one more, and must not be more than the model may have.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.controller.cluster_view.fleet import Member, Standing, members_of
from services.controller.cluster_view.moves import move_seconds
from services.controller.cluster_view.view import Node, Policy, Scheduling, View
from services.controller.placement.options import Option, free_option
from services.controller.placement.room import never_fits, situation_of
from services.controller.scaling.actions import Migrate, Start
from stoker.errors import AlreadyExists, CapacityError, DoesNotFit, InUse, NotFound
from stoker.ids import ModelName, NodeId, ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """The source's sessions go to a replica that is there already, or on its way."""

    source: Member
    to: ReplicaId


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """A replica is started there, then the source's sessions follow."""

    source: Member
    move: Migrate


def operator_move(
    view: View, name: ModelName, to_node_id: NodeId, now_seconds: float, policy: Policy
) -> Join | Begin:
    """Decide how a deployed model gets to a node.

    Raises:
        NotFound: No such node, or the model runs nowhere.
        AlreadyExists: All that runs of it is there already.
        InUse: The node takes no replicas, or the one that would go is on its way elsewhere.
        CapacityError: There is no room now; DoesNotFit: never.
    """
    node = usable_node(view, to_node_id)
    current = [found for found in members_of(view, name) if not found.stale]
    ready = [found for found in current if found.standing is Standing.READY]
    if not ready:
        raise NotFound(f"model {name} runs nowhere: there is nothing to move; its first request starts it")
    elsewhere = [found for found in ready if found.reservation.node_id != to_node_id]
    if not elsewhere:
        raise AlreadyExists(f"model {name} runs on {to_node_id} already, and nowhere else")
    source = max(elsewhere, key=lambda found: (_sessions(found), found.reservation.replica_id))
    if source.reservation.moving_to is not None:
        raise InUse(
            f"replica {source.reservation.replica_id} of model {name} is moving to "
            f"{source.reservation.moving_to} already; see `stoker events`"
        )
    there = [
        found
        for found in current
        if found.reservation.node_id == to_node_id and found.standing in (Standing.READY, Standing.STARTING)
    ]
    if there:
        return Join(source=source, to=there[0].reservation.replica_id)
    return Begin(source=source, move=_begun(view, name, source, node, now_seconds, policy))


def place_for_request(
    view: View, name: ModelName, to_node_id: NodeId, now_seconds: float, policy: Policy
) -> ReplicaId | Start:
    """Return the replica on a node that one request of a model can move to, or the start that makes one.

    Raises:
        NotFound: No such node.
        InUse: The node takes no replicas, or the model has as many as it may.
        CapacityError: There is no room now; DoesNotFit: never.
    """
    node = usable_node(view, to_node_id)
    live = [
        found
        for found in members_of(view, name)
        if not found.stale and found.standing in (Standing.READY, Standing.STARTING)
    ]
    there = [found for found in live if found.reservation.node_id == to_node_id]
    if there:
        best = min(
            there, key=lambda found: (found.standing is not Standing.READY, found.reservation.replica_id)
        )
        return best.reservation.replica_id
    model = view.models[name]
    if len(live) >= model.max_replicas:
        raise InUse(
            f"model {name} has no replica on node {to_node_id}, and {len(live)} of at most "
            f"{model.max_replicas} elsewhere: `stoker migrate {name} --to {to_node_id}` moves one with all "
            "its requests, a higher max_replicas lets this request go alone"
        )
    option = _room_on(view, name, node, now_seconds, policy)
    return Start(
        model=name,
        node_id=node.node_id,
        devices=option.devices,
        runtime=model.runtime,
        estimate=option.estimate,
        options=(option,),
    )


def usable_node(view: View, node_id: NodeId) -> Node:
    """Return a node that takes replicas.

    Raises:
        NotFound: It has not joined.
        InUse: It is silent, cordoned, drained, or about to stop.
    """
    node = view.nodes.get(node_id)
    if node is None:
        known = ", ".join(sorted(view.nodes)[:8]) or "none"
        raise NotFound(f"node {node_id!r} has not joined; there are: {known}")
    scheduling = view.scheduling.get(node_id, Scheduling.OPEN)
    if scheduling is not Scheduling.OPEN:
        raise InUse(f"node {node_id} is {scheduling.value}; `stoker undrain {node_id}` opens it")
    if not node.reachable or not node.connected or node.draining:
        raise InUse(f"node {node_id} is silent or about to stop; see `stoker nodes`")
    return node


def _begun(  # noqa: PLR0913, PLR0917 - what a decision is made of
    view: View, name: ModelName, source: Member, node: Node, now_seconds: float, policy: Policy
) -> Migrate:
    option = _room_on(view, name, node, now_seconds, policy)
    tokens = source.replica.context_tokens if source.replica else 0
    return Migrate(
        replica_id=source.reservation.replica_id,
        model=name,
        node_id=source.reservation.node_id,
        to_node_id=node.node_id,
        to_devices=option.devices,
        runtime=view.models[name].runtime,
        estimate=option.estimate,
        move_seconds=move_seconds(view, name, tokens, policy),
        for_model=None,
    )


def _room_on(view: View, name: ModelName, node: Node, now_seconds: float, policy: Policy) -> Option:
    """Return the start on a node that disturbs nobody.

    Raises:
        CapacityError: There is no room now; DoesNotFit: never.
    """
    situation = situation_of(view, name, now_seconds, policy, may_disturb=False)
    never = never_fits(situation.model, node)
    if never is not None:
        raise DoesNotFit(f"model {name} never fits node {node.node_id}: {never.reason}")
    option = free_option(situation, node, situation.wanted)
    if option is None:
        raise CapacityError(
            f"node {node.node_id} has no free slots or memory for model {name}: stop or move what runs there",
            retry_after_seconds=5.0,
        )
    return option


def _sessions(found: Member) -> int:
    return found.replica.sessions if found.replica else 0
