"""Reports that change nothing but the sessions of some replicas: told apart, and cheap to fold. Pure.

Most reports are such: a session began or ended. Whatever else the view says of the node stays the very same
object, so that `index` need not look at it again.
"""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter
from statistics import median

from services.controller.cluster_view.events import LoadReported, SessionLoad
from services.controller.cluster_view.frozen import copier_of, finished
from services.controller.cluster_view.lessons import is_complete, rates_after
from services.controller.cluster_view.view import Node, Phase, Replica, View

Load = tuple[Replica, Replica]
"""A replica before and after a load report."""
_said = attrgetter(
    "agent_address",
    "store_address",
    "devices",
    "stages",
    "pool",
    "architectures",
    "warm_workers",
    "worker_start_seconds",
    "next_worker_seconds",
    "draining",
    "labels",
    "moved",
)
"""What an agent says of its node beside its replicas, and what its store holds: that is compared last."""
_LOAD = (
    "sessions",
    "waiting_sessions",
    "waiting_since_seconds",
    "longest_since_seconds",
    "idle_since_seconds",
    "context_tokens",
)
"""Of a replica, what its sessions change."""
_load_of = attrgetter(*_LOAD)
_draft_of_node, _draft_of_replica = copier_of(Node), copier_of(Replica)
_REMEMBERED = ("first_seen_seconds", "ready_since_seconds")
"""Of a replica, what no agent says: this controller knows it."""
_WAITS = ("waiting_since_seconds", "longest_since_seconds")
"""Of a replica, moments that are worked out here."""
SAME_WAIT_SECONDS = 0.1
"""A wait that is told anew began at the moment known before, give or take what a report's way takes."""
_reported = attrgetter(*(each.name for each in fields(Replica) if each.name not in {*_REMEMBERED, *_WAITS}))
"""Of a replica, what its agent says, and must be the same to the last bit."""
_beside_load = attrgetter(*(each.name for each in fields(Replica) if each.name not in {*_REMEMBERED, *_LOAD}))
"""Of a replica, what its agent says beside its sessions."""


def narrowed(view: View, node: Node) -> LoadReported | None:
    """Return what a whole report says if that is no more than how many sessions run; None = it says more."""
    before = view.nodes.get(node.node_id)
    if before is None or not before.connected or not before.reachable:
        return None
    if before.replicas.keys() != node.replicas.keys() or _said(before) != _said(node):
        return None
    found = [
        (was, replica)
        for replica_id, replica in node.replicas.items()
        if (was := before.replicas[replica_id]) is not replica
    ]
    same = (
        all(_differs_in_load(was, replica) for was, replica in found)
        and all(_was_reported(view, node, replica) for replica in node.replicas.values())
        and before.held == node.held
        and before.learnt == rates_after(node, before, [], view.fleet)
        and before.opening == {tier: median(seconds) for tier, seconds in view.fleet.openings.items()}
    )
    if not same:
        return None
    told = [replica for was, replica in found if _load_of(was) != _load_of(replica)]
    return LoadReported(node_id=node.node_id, replicas=tuple(told), seen_seconds=node.last_seen_seconds)


def with_load(node: Node, event: LoadReported) -> tuple[Node, list[Load]]:
    """Return a node after a load report, and its replicas whose sessions or contexts are others now.

    Replicas that it has not reported whole stay unknown.
    """
    replicas, loads = dict(node.replicas), []
    for replica in event.replicas:
        was = replicas.get(replica.replica_id)
        if was is None:
            continue
        draft = _draft_of_replica(was)
        draft.sessions = replica.sessions
        draft.waiting_sessions = replica.waiting_sessions
        if replica.waiting_sessions:
            draft.waiting_since_seconds = waiting_since(replica, was, event.seen_seconds)
            draft.longest_since_seconds = longest_since(replica, was)
        else:
            draft.waiting_since_seconds = draft.longest_since_seconds = None
        draft.idle_since_seconds = replica.idle_since_seconds
        draft.context_tokens = replica.context_tokens
        now = replicas[replica.replica_id] = finished(draft, Replica)
        loads.append((was, now))
    after = _draft_of_node(node)
    after.replicas = replicas
    after.last_seen_seconds = event.seen_seconds
    return finished(after, Node), loads


def differs_in_sessions(was: Replica, now: Replica) -> bool:
    """Tell whether after a load report more than the length of a replica's contexts is other."""
    return (
        was.sessions != now.sessions
        or was.waiting_sessions != now.waiting_sessions
        or was.waiting_since_seconds != now.waiting_since_seconds
        or was.longest_since_seconds != now.longest_since_seconds
        or was.idle_since_seconds != now.idle_since_seconds
    )


def is_woken(was: Replica, now: Replica) -> bool:
    """Tell whether a ready replica was idle and serves sessions now."""
    return now.sessions > 0 and was.phase is Phase.READY and not was.sessions


def remembered(replica: Replica, before: Replica | None, now_seconds: float) -> Replica:
    """Return a reported replica with since when this controller has known what it is.

    It is the one before, where nothing of it has changed: what follows from it need not be looked at again.
    """
    waiting_since_seconds = waiting_since(replica, before, now_seconds)
    longest_since_seconds = longest_since(replica, before)
    if (
        before is not None
        and before.waiting_since_seconds == waiting_since_seconds
        and before.longest_since_seconds == longest_since_seconds
        and (before.ready_since_seconds is not None or not is_complete(replica))
        and _reported(before) == _reported(replica)
    ):
        return before
    ready_since_seconds = before.ready_since_seconds if before else None
    if ready_since_seconds is None and is_complete(replica):
        ready_since_seconds = now_seconds
    draft = _draft_of_replica(replica)
    draft.first_seen_seconds = before.first_seen_seconds if before else now_seconds
    draft.ready_since_seconds = ready_since_seconds
    draft.waiting_since_seconds = waiting_since_seconds
    draft.longest_since_seconds = longest_since_seconds
    return finished(draft, Replica)


def waiting_since(replica: Replica | SessionLoad, before: Replica | None, now_seconds: float) -> float | None:
    """Return since when sessions have waited in a replica's queue without a break; None = none does."""
    if not replica.waiting_sessions:
        return None
    return before.waiting_since_seconds if before and before.waiting_sessions else now_seconds


def longest_since(replica: Replica | SessionLoad, before: Replica | None) -> float | None:
    """Return since when the session that has waited longest does, as its agent tells; None = none, or untold.

    The moment known before stays where the one that is told differs by no more than a report's way.
    """
    told_seconds = replica.longest_since_seconds
    if told_seconds is None or not replica.waiting_sessions:
        return None
    known_seconds = before.longest_since_seconds if before is not None else None
    if known_seconds is not None and abs(known_seconds - told_seconds) <= SAME_WAIT_SECONDS:
        return known_seconds
    return told_seconds


def _differs_in_load(was: Replica, replica: Replica) -> bool:
    """Tell whether two reports of a replica differ in its sessions at most."""
    if was.ready_since_seconds is None and is_complete(replica):
        return False
    return _beside_load(was) == _beside_load(replica)


def _was_reported(view: View, node: Node, replica: Replica) -> bool:
    """Tell whether a report of this replica is no news to its reservation."""
    mine = view.reservations.get(replica.replica_id)
    return mine is None or (mine.reported and not mine.lost and mine.node_id == node.node_id)
