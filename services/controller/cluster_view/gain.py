"""Which events may have made room for a model that waits: the others need not place it again. Pure.

Rules:
1. A node gains by a slot that is free now, a replica that may go now (ready, or idle where it was busy), less
   in its pool, another shape or label, being open again, or other replicas on their way out.
2. A model that is not asked for any more may lose its idle replicas, and one with a minimum any beyond it.
3. Deployments and operators' wishes may change anything.
4. What only time brings (a residency that ends, a bound on waiting) is a refusal's `retry_at_seconds`.

An event that makes no room after all costs a look; one that is missed would let a model wait for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from services.controller.cluster_view.attention import EMPTY
from services.controller.cluster_view.events import (
    DemandEnded,
    Event,
    ModelDeleted,
    ModelPut,
    MoveGivenUp,
    NodeForgotten,
    Released,
    Reserved,
    SchedulingSet,
    StopRefused,
)
from services.controller.cluster_view.holdings import Change
from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.summary import Summary
from services.controller.cluster_view.view import Node, View
from stoker.ids import NodeId


def makes_room(
    before: View,
    after: View,
    event: Event,
    nodes: AbstractSet[NodeId],
    held: Sequence[Change] = (),
) -> bool:
    """Tell whether a model that waits might be placed after this event.

    Args:
        before: With its index.
        after: Likewise.
        event: What happened.
        nodes: Those it may have changed.
        held: Of a whole report, what the node's store holds otherwise than before.
    """
    match event:
        case ModelPut() | ModelDeleted() | SchedulingSet() | NodeForgotten():
            return True
        case (
            Released(replica_id=replica_id)
            | StopRefused(replica_id=replica_id)
            | MoveGivenUp(replica_id=replica_id)
        ):
            return replica_id in before.reservations
        case Reserved(reservation=reservation):
            model = after.models.get(reservation.model)
            return model is not None and model.min_replicas > 0
        case DemandEnded(model=name):
            return name not in after.demands and index_of(after).tallies.get(name, EMPTY).live > 0
        case _:
            return any(_gains(before, after, node_id, held) for node_id in nodes)


def load_makes_room(was: Summary, now: Summary) -> bool:
    """Tell the same of a report of nothing but sessions, from the summaries of its node."""
    if not now.is_open:
        return now.leaving_for != ()
    return _may_be_disturbed_more(was, now)


def _gains(before: View, after: View, node_id: NodeId, held: Sequence[Change]) -> bool:
    was, now = before.nodes.get(node_id), after.nodes.get(node_id)
    was_summary = index_of(before).summaries.get(node_id)
    now_summary = index_of(after).summaries.get(node_id)
    if was is None or now is None or was_summary is None or now_summary is None:
        return True
    if not now_summary.is_open:
        return was_summary.leaving_for != () or now_summary.leaving_for != ()
    return (
        not was_summary.is_open
        or was_summary.shape != now_summary.shape
        or _may_go_more(was_summary, now_summary)
        or (was is not now and _is_another(was, now, held))  # the costliest last
    )


def _may_be_disturbed_more(was: Summary, now: Summary) -> bool:
    if was.worth_keys == now.worth_keys and was.busy == now.busy:
        return False
    was_idle = {replica_id for _, replica_id in was.worth_keys}
    if not was_idle.issuperset([replica_id for _, replica_id in now.worth_keys]):
        return True
    return not was_idle.union(was.busy).issuperset(now.busy)


def _may_go_more(was: Summary, now: Summary) -> bool:
    return (
        (was.free != now.free and not set(was.free).issuperset(now.free))
        or _may_be_disturbed_more(was, now)
        or (was.settling != now.settling and not set(was.settling).issuperset(now.settling))
        or was.leaving_for != now.leaving_for
        or (was.coming != now.coming and not set(now.coming).issuperset(was.coming))
    )


def _is_another(was: Node, now: Node, held: Sequence[Change]) -> bool:
    """Tell whether a report changed what else decides if a model fits: labels, and what the pool leases."""
    if was.labels != now.labels:
        return True
    if not now.pool.total_bytes or was.held is now.held:
        return was.pool.leased_bytes > now.pool.leased_bytes
    return was.pool.leased_bytes != now.pool.leased_bytes or any(
        after.leases != (before.leases if before is not None else 0)
        for _, before, after in held
        if after is not None
    )
