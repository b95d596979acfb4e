"""Reports that change nothing but the sessions of some replicas: told apart, and cheap to fold. Pure.

Most reports are such: a session began or ended. Whatever else the view says of the node stays the very same
object, so that `index` need not look at it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from operator import attrgetter
from statistics import median

from services.controller.cluster_view.events import LoadReported, SessionLoad
from services.controller.cluster_view.frozen import amender_of, changed
from services.controller.cluster_view.lessons import is_complete, rates_after
from services.controller.cluster_view.view import Node, Phase, Replica, Stage, View

Load = tuple[Replica, Replica]
"""A replica before and after a load report."""
_said = attrgetter(
    "agent_address",
    "store_address",
    "devices",
    "pool",
    "architectures",
    "warm_workers",
    "worker_start_seconds",
    "next_worker_seconds",
    "draining",
    "labels",
    "moved",
)
"""What an agent says of its node beside its replicas and stages, and what its store holds: that is compared
last."""
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
_loaded_node = amender_of(Node, "replicas", "last_seen_seconds")
_loaded_replica = amender_of(Replica, *_LOAD, "has_served")
_remembered_replica = amender_of(
    Replica,
    "first_seen_seconds",
    "ready_since_seconds",
    "waiting_since_seconds",
    "longest_since_seconds",
    "has_served",
)
_queued_stage = amender_of(Stage, "queued_bytes")
_REMEMBERED = ("first_seen_seconds", "ready_since_seconds", "has_served")
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
    """Return what a whole report says if that is no more than sessions and what waits before stages.

    None = it says more.
    """
    before = view.nodes.get(node.node_id)
    if before is None or not before.connected or not before.reachable:
        return None
    if before.replicas.keys() != node.replicas.keys() or _said(before) != _said(node):
        return None
    queued_bytes = _queues(before.stages, node.stages)
    if queued_bytes is None:
        return None
    found = [
        (was, replica)
        for replica_id, replica in node.replicas.items()
        if (was := before.replicas[replica_id]) is not replica
    ]
    same = (
        all(_differs_in_load(was, replica) for was, replica in found)
        and all(_was_reported(view, node, replica) for replica in node.replicas.values())
        and (before.held is node.held or before.held == node.held)
        and before.learnt == rates_after(node, before, [], view.fleet)
        and before.opening == {tier: median(seconds) for tier, seconds in view.fleet.openings.items()}
    )
    if not same:
        return None
    told = [replica for was, replica in found if _load_of(was) != _load_of(replica)]
    return LoadReported(
        node_id=node.node_id,
        replicas=tuple(told),
        seen_seconds=node.last_seen_seconds,
        queued_bytes=queued_bytes or None,
    )


def with_load(node: Node, event: LoadReported) -> tuple[Node, list[Load]]:
    """Return a node after a load report, and its replicas where more than a context's length is other now.

    Replicas that it has not reported whole stay unknown.
    """
    replicas, loads = dict(node.replicas), []
    for replica in event.replicas:
        was = replicas.get(replica.replica_id)
        if was is None:
            continue
        now = replicas[was.replica_id] = _loaded_replica(
            was,
            replica.sessions,
            replica.waiting_sessions,
            waiting_since(replica, was, event.seen_seconds) if replica.waiting_sessions else None,
            longest_since(replica, was) if replica.waiting_sessions else None,
            replica.idle_since_seconds,
            replica.context_tokens,
            was.has_served or replica.sessions > replica.waiting_sessions,
        )
        if differs_in_sessions(was, now):
            loads.append((was, now))
    if event.queued_bytes is None:
        return _loaded_node(node, replicas, event.seen_seconds), loads
    stages = with_queues(node.stages, event.queued_bytes)
    return changed(node, replicas=replicas, last_seen_seconds=event.seen_seconds, stages=stages), loads


def with_queues(stages: Mapping[str, Stage], queued_bytes: Mapping[str, int]) -> Mapping[str, Stage]:
    """Return a node's stages with what waits before them now; the very same where that is as before."""
    others = {
        name: _queued_stage(stage, queued_bytes[name])
        for name, stage in stages.items()
        if queued_bytes.get(name, stage.queued_bytes) != stage.queued_bytes
    }
    return {**stages, **others} if others else stages


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
    return _remembered_replica(
        replica,
        before.first_seen_seconds if before else now_seconds,
        ready_since_seconds,
        waiting_since_seconds,
        longest_since_seconds,
        (before is not None and before.has_served) or replica.sessions > replica.waiting_sessions,
    )


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


def _queues(was: Mapping[str, Stage], now: Mapping[str, Stage]) -> dict[str, int] | None:
    """Return what waits before the stages where that is other than before; None = a rate is, too."""
    if was is now:
        return {}
    if was.keys() != now.keys():
        return None
    if any(was[name].bytes_per_second != stage.bytes_per_second for name, stage in now.items()):
        return None
    return {
        name: stage.queued_bytes
        for name, stage in now.items()
        if stage.queued_bytes != was[name].queued_bytes
    }


def _differs_in_load(was: Replica, replica: Replica) -> bool:
    """Tell whether two reports of a replica differ in its sessions at most."""
    if was.ready_since_seconds is None and is_complete(replica):
        return False
    return _beside_load(was) == _beside_load(replica)


def _was_reported(view: View, node: Node, replica: Replica) -> bool:
    """Tell whether a report of this replica is no news to its reservation."""
    mine = view.reservations.get(replica.replica_id)
    return mine is None or (mine.reported and not mine.lost and mine.node_id == node.node_id)
