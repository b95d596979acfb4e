"""What must change: `reconcile(view, now_seconds, policy) -> Plan`, pure.

Rules, in the order in which they run:

1. Nodes: silent beyond the time-out → unreachable; silent for very long → forgotten. Replicas whose nodes a
   new controller has waited for in vain → lost. Orphans that nobody reserved are stopped.
2. Replicas that must go: failed starts (and the model backs off), replicas of deleted models, stale ones
   after a redeploy, those on drained nodes, surplus ones, and idle ones whose keep-alive is over. A replica
   that moves goes once its destination is ready.
3. Reservations whose replica is gone are released.
4. Models that want a replica get one, who waits longest first: requests that wait, for a first replica or
   for a place in the batch of one, then `min_replicas`, then more sessions than the replicas' concurrency, or
   a forecast. When each was looked at, those with waiting requests get as many more as these fill, in turn.
   A model that backs off gets none.

Only models that `attention` says may need something are looked at, and of those that wait for room none
before there may be some (`gain`). The plan says what to do now and when to
look again though nothing happens.
"""

from __future__ import annotations

from math import inf

from services.controller.cluster_view.frozen import maker_of
from services.controller.cluster_view.view import Policy, View
from services.controller.scaling.actions import Plan
from services.controller.scaling.planner import Planner
from services.controller.scaling.starting import lacks_more_room, start_what_is_wanted
from services.controller.scaling.stopping import (
    check_nodes,
    may_have_to_go,
    release_what_is_gone,
    stop_orphans,
    stop_what_must_go,
)
from stoker.ids import ModelName

_make_plan = maker_of(Plan)


def reconcile(view: View, now_seconds: float, policy: Policy) -> Plan:
    """Decide everything that is to be decided about this view."""
    nothing = _nothing_is_due(view, now_seconds, policy)
    if nothing is not None:
        return nothing
    planner = Planner(view, now_seconds, policy)
    check_nodes(planner)
    stop_orphans(planner)
    room = planner.view.room
    names = _to_look_at(planner)
    if names:
        for name in names:
            if may_have_to_go(planner, name):
                stop_what_must_go(planner, name)
        for name in names:
            if may_have_to_go(planner, name):
                release_what_is_gone(planner, name)
        start_what_is_wanted(planner, names)
    planner.settle(room)
    return Plan(
        actions=tuple(planner.actions),
        next_due_seconds=planner.next_due_seconds,
        decisions=tuple(planner.decisions),
        foreseen=tuple(planner.foreseen),
    )


def _nothing_is_due(view: View, now_seconds: float, policy: Policy) -> Plan | None:
    """Return the plan of a look at which nothing is due, as most are; None = something may be.

    Models that wait for room, and those with replicas on nodes that are not in the cluster, are due at every
    look (`attention`). Replicas that nobody reserved belong to no model.
    """
    index = view.index
    if index is None or index.orphaned:
        return None
    due, seen = index.due.runs, index.last_seen.runs
    next_seconds = due[0][0][0] if due else inf
    if seen:  # as `check_nodes` has it
        next_seconds = min(next_seconds, seen[0][0][0] + policy.node_timeout_seconds)
    if next_seconds <= now_seconds:
        return None
    return _make_plan(actions=(), next_due_seconds=next_seconds if next_seconds < inf else None)


def _to_look_at(planner: Planner) -> list[ModelName]:
    """Return the models that are due, by name, and have the next one looked at in time."""
    now: list[ModelName] = []
    for at_seconds, name in planner.index.due:
        if at_seconds > planner.now_seconds:
            planner.look_again(at_seconds)
            break
        if not _only_waits(planner, name):
            now.append(name)
    return sorted(now)


def _only_waits(planner: Planner, name: ModelName) -> bool:
    """Tell whether a model has no replica, and waits for room that there still is not."""
    view = planner.view
    is_asked_for = name in view.demands or name in view.always
    return (
        is_asked_for
        and name in view.refusals
        and name not in planner.index.tallies
        and planner.still_waits(name, may_disturb=is_asked_for)
        and not lacks_more_room(planner, name)
    )
