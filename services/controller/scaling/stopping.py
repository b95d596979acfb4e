"""Rules for what must go: silent nodes, failed starts, orphans, stale, surplus and unused replicas. Pure."""

from __future__ import annotations

from services.controller.cluster_view.attention import EMPTY
from services.controller.cluster_view.events import (
    MoveGivenUp,
    NodeForgotten,
    NodeUnreachable,
    Releasing,
    ReplicaLost,
)
from services.controller.cluster_view.fleet import Member, Standing, is_idle, is_leaving
from services.controller.cluster_view.forecast import keep_until_seconds
from services.controller.cluster_view.index import reservations_of
from services.controller.cluster_view.view import Model, Node, Phase, Reservation, Scheduling
from services.controller.scaling.actions import Release, Stop, start_failed
from services.controller.scaling.planner import Planner
from stoker.ids import ModelName

LIVE = (Standing.STARTING, Standing.READY)


def check_nodes(planner: Planner) -> None:
    """Silent beyond the time-out → unreachable; silent for very long → forgotten; never came → lost."""
    policy, index = planner.policy, planner.index
    for least_seconds, node_id in index.last_seen:
        if least_seconds + policy.node_timeout_seconds > planner.now_seconds:
            planner.look_again(least_seconds + policy.node_timeout_seconds)
            break  # the others were heard of later, or within the same second
        last_seen_seconds = planner.view.nodes[node_id].last_seen_seconds
        if not planner.is_over(last_seen_seconds + policy.node_timeout_seconds):
            continue
        if planner.view.nodes[node_id].reachable:
            planner.note(NodeUnreachable(node_id=node_id))
        elif planner.is_over(last_seen_seconds + policy.node_forget_seconds):
            planner.note(NodeForgotten(node_id=node_id))
    for node_id in sorted(planner.index.homeless) if index.homeless else ():
        for replica_id in planner.index.on_node.get(node_id, ()):
            reservation = planner.view.reservations[replica_id]
            if not reservation.lost and planner.is_over(
                reservation.seen_seconds + policy.node_timeout_seconds
            ):
                planner.note(ReplicaLost(replica_id=replica_id))


def stop_orphans(planner: Planner) -> None:
    """Stop replicas that nobody reserved, after a grace: their reservation may still be on its way."""
    orphaned = planner.index.orphaned
    for node_id in sorted(orphaned) if orphaned else ():
        _stop_orphans_on(planner, planner.view.nodes[node_id])


def _stop_orphans_on(planner: Planner, node: Node) -> None:
    grace_seconds = planner.policy.orphan_grace_seconds
    for replica_id in sorted(node.replicas):
        replica = node.replicas[replica_id]
        if replica_id in planner.view.reservations or replica.phase is Phase.STOPPING or not node.connected:
            continue
        if planner.is_over(replica.first_seen_seconds + grace_seconds):
            planner.actions.append(
                Stop(
                    replica_id=replica_id,
                    node_id=node.node_id,
                    only_if_idle=False,
                    reason="nobody reserved it",
                )
            )
            planner.look_again(planner.now_seconds + grace_seconds)


def may_have_to_go(planner: Planner, name: ModelName) -> bool:
    """Tell whether any replica of a model may have to end: not where all serve or start, and may stay."""
    tally = planner.index.tallies.get(name, EMPTY)
    return bool(tally.cares or tally.idle_since) or name not in planner.view.models


def stop_what_must_go(planner: Planner, name: ModelName) -> None:
    """Decide which of a model's replicas end."""
    members = planner.members_of(name)
    model = planner.view.models.get(name)
    for found in members:
        if found.standing is Standing.FAILED:
            _give_up(planner, found)
        elif model is None and found.standing in LIVE:
            planner.stop(found, "model deleted", only_if_idle=False)
    if model is not None:
        _finish_moves(planner, members)
        _replace_stale(planner, members)
        _leave_drained_nodes(planner, members)
        _stop_unused(planner, model, planner.members_of(name))


def release_what_is_gone(planner: Planner, name: ModelName) -> None:
    """Release the reservations of a model whose replicas are gone."""
    for reservation in reservations_of(planner.view, planner.index, name):
        reason = None if reservation.releasing else _gone(planner, reservation)
        if reason is not None:
            planner.fold(Releasing(replica_id=reservation.replica_id))
            planner.actions.append(Release(replica_id=reservation.replica_id, reason=reason))


def _give_up(planner: Planner, found: Member) -> None:
    replica = found.replica
    if replica is None or found.node is None or not found.node.connected:
        return  # its node's next report brings us back here
    if replica.ready_since_seconds is not None:
        planner.stop(found, "its worker died", only_if_idle=False)
        return
    failed = start_failed(
        planner.view,
        found.reservation.model,
        code=replica.error_code or "load_failed",
        message=replica.error_message or "the node agent gave no reason",
        now_seconds=planner.now_seconds,
        policy=planner.policy,
    )
    planner.note(failed)
    planner.stop(found, "start failed", only_if_idle=False)


def _finish_moves(planner: Planner, members: tuple[Member, ...]) -> None:
    """Once the destination of a move is ready the source goes; if it will never be, the source stays."""
    by_id = {found.reservation.replica_id: found for found in members}
    for found in members:
        moving_to = found.reservation.moving_to
        if moving_to is None or found.standing is not Standing.READY:
            continue
        destination = by_id.get(moving_to)
        if destination is None or destination.standing not in LIVE:
            planner.note(MoveGivenUp(replica_id=found.reservation.replica_id))
        elif destination.standing is Standing.READY:
            planner.stop(found, f"moved to {moving_to}", only_if_idle=False)


def _replace_stale(planner: Planner, members: tuple[Member, ...]) -> None:
    """Replace what runs an older deployment: idle ones now, busy ones once a current one is ready."""
    current_ready = any(not found.stale and found.standing is Standing.READY for found in members)
    for found in members:
        if not found.stale or found.standing not in LIVE:
            continue
        if found.standing is Standing.STARTING or is_idle(found):
            planner.stop(found, "replaced by a newer deployment", only_if_idle=is_idle(found))
        elif current_ready or planner.is_over(
            found.reservation.seen_seconds + planner.policy.replace_after_seconds
        ):
            planner.stop(found, "replaced by a newer deployment", only_if_idle=False)


def _leave_drained_nodes(planner: Planner, members: tuple[Member, ...]) -> None:
    """Empty nodes that an operator drains: idle replicas now, busy ones once their sessions have ended.

    A busy one whose sessions can move at once, for the model is ready elsewhere, is stopped with grace: that
    is what makes them move. `starting` brings that other one, if there is room for it.
    """
    scheduling = planner.view.scheduling
    for found in members:
        if scheduling.get(found.reservation.node_id) is not Scheduling.DRAINED or found.stale:
            continue
        if is_idle(found):
            planner.stop(found, "its node is drained", only_if_idle=True)
        elif found.standing is Standing.READY and any(
            other.standing is Standing.READY and not other.stale and not is_leaving(planner.view, other)
            for other in members
        ):
            planner.stop(found, "its node is drained", only_if_idle=False)


def _stop_unused(planner: Planner, model: Model, members: tuple[Member, ...]) -> None:
    """Stop replicas idle for the keep-alive, the longest idle first, and never below the minimum.

    Those that leave with their node don't count, as they don't for starts: what replaces one is no surplus.
    """
    current = [found for found in members if not found.stale and not is_leaving(planner.view, found)]
    live = sum(found.standing in LIVE and found.reservation.moving_to is None for found in current)
    spare = live - model.min_replicas
    if spare <= 0 or model.name in planner.view.demands:
        return
    idle = sorted(
        (found for found in current if is_idle(found)),
        key=lambda found: (_idle_since_seconds(found), found.reservation.replica_id),
    )
    surplus = live - model.max_replicas
    for found in idle[:spare]:
        over_seconds = _keep_until_seconds(planner, model, found)
        if surplus > 0:
            planner.stop(found, "more replicas than the maximum", only_if_idle=True)
            surplus -= 1
        elif over_seconds is not None and planner.is_over(over_seconds):
            planner.stop(found, "keep-alive is over", only_if_idle=True)


def _gone(planner: Planner, reservation: Reservation) -> str | None:
    """Return why the reservation holds no longer; None while it does."""
    policy = planner.policy
    node = planner.view.nodes.get(reservation.node_id)
    if node is None:
        over = planner.is_over(reservation.seen_seconds + policy.node_forget_seconds)
        return "its node is gone" if over else None
    if reservation.replica_id in node.replicas:
        return None
    if not node.connected:
        return None  # the last report is old; the next one, or forgetting the node, decides
    if reservation.reported:
        return "its node no longer runs it"
    if reservation.adopted:
        return "its node does not run it"
    # The last report may be older than the order, so its silence says nothing yet, not even after a stop.
    over = planner.is_over(reservation.seen_seconds + policy.order_grace_seconds)
    return "its node never reported it" if over else None


def _idle_since_seconds(found: Member) -> float:
    since_seconds = found.replica.idle_since_seconds if found.replica else None
    return since_seconds if since_seconds is not None else 0.0


def _keep_until_seconds(planner: Planner, model: Model, found: Member) -> float | None:
    """Return until when an idle replica is kept: its keep-alive, and long enough for its first request."""
    replica = found.replica
    if replica is None or replica.loading:
        return None
    arrivals = planner.view.arrivals.get(model.name)
    until_seconds = keep_until_seconds(model, arrivals, _idle_since_seconds(found))
    if until_seconds is None:
        return None
    residency_seconds = planner.policy.minimum_residency_seconds
    return max(until_seconds, (replica.ready_since_seconds or 0.0) + residency_seconds)
