"""When `reconcile` must look at a model next: never later than something is to be done about it. Pure.

It may be too early, which costs a look; policy and time stay out of it, so that it holds until the model, its
demand or one of its replicas changes. Each replica is a `Mark`, and a model's marks are summed in a `Tally`,
so that one replica's change costs the same however many the model has.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

from services.controller.cluster_view.fleet import Member, Standing, is_idle, is_leaving
from services.controller.cluster_view.forecast import keep_alive_seconds, prewarm_window_seconds
from services.controller.cluster_view.frozen import copier_of, finished
from services.controller.cluster_view.view import Model, Phase, Replica, View
from stoker.ids import ModelName

NOW = 0.0
"""At every look."""
LIVE = (Standing.STARTING, Standing.READY)


_new_tuple = tuple.__new__
"""Makes a named tuple without the call that names its fields."""


class Mark(NamedTuple):
    """What one replica adds to its model's tally; a tuple, because every event makes some."""

    cares: int = 0
    live: int = 0
    waiting: int = 0
    sessions: int = 0
    idle_since_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """A model's replicas, summed.

    Attributes:
        replicas: How many are reserved.
        cares: Those in a state that rules other than keep-alive are about.
        live: Those ready or starting, and not moving away.
        waiting: Those in which sessions wait for a place in the batch.
        sessions: On all of them.
        idle_since: When the idle ones fell idle, sorted.
    """

    replicas: int = 0
    cares: int = 0
    live: int = 0
    waiting: int = 0
    sessions: int = 0
    idle_since: tuple[float, ...] = ()

    def after(self, was: Mark | None, now: Mark | None) -> Tally:
        """Return the tally with one mark in place of another; None = the replica comes, or goes."""
        old, new = was or NO_MARK, now or NO_MARK
        idle = self.idle_since
        if old.idle_since_seconds != new.idle_since_seconds:
            idle = _without(idle, old.idle_since_seconds)
            idle = _with(idle, new.idle_since_seconds)
        draft = _draft_of(self)
        draft.replicas += (now is not None) - (was is not None)
        draft.cares += new.cares - old.cares
        draft.live += new.live - old.live
        draft.waiting += new.waiting - old.waiting
        draft.sessions += new.sessions - old.sessions
        draft.idle_since = idle
        return finished(draft, Tally)


def _without(moments: tuple[float, ...], moment: float | None) -> tuple[float, ...]:
    if moment is None:
        return moments
    place = bisect_left(moments, moment)
    return moments[:place] + moments[place + 1 :]


def _with(moments: tuple[float, ...], moment: float | None) -> tuple[float, ...]:
    if moment is None:
        return moments
    place = bisect_left(moments, moment)
    return (*moments[:place], moment, *moments[place:])


_draft_of = copier_of(Tally)
NO_MARK = Mark()
EMPTY = Tally()


def mark_of(view: View, found: Member) -> Mark:
    """Return what a replica adds to its model's tally."""
    replica, moving = found.replica, found.reservation.moving_to is not None
    return Mark(
        cares=int(
            found.standing not in LIVE
            or found.stale
            or moving
            or found.node is None
            or replica is None  # ordered and not reported yet: given up after a grace
            or is_leaving(view, found)
        ),
        live=int(found.standing in LIVE and not moving),
        waiting=int(replica is not None and replica.waiting_since_seconds is not None),
        sessions=replica.sessions if replica is not None else 0,
        idle_since_seconds=replica.idle_since_seconds if replica is not None and is_idle(found) else None,
    )


def mark_with_load(mark: Mark, replica: Replica) -> Mark | None:
    """Return a mark after nothing but its replica's sessions have changed; None = it takes a closer look."""
    if not mark.live or replica.phase is not Phase.READY:
        return None
    is_idle_now = replica.sessions == 0 and replica.idle_since_seconds is not None
    waiting = int(replica.waiting_since_seconds is not None)
    idle_since_seconds = replica.idle_since_seconds if is_idle_now else None
    return _new_tuple(Mark, (mark.cares, mark.live, waiting, replica.sessions, idle_since_seconds))


def due_of(view: View, name: ModelName, tally: Tally) -> float | None:
    """Return from when on the model needs a look; None = not before something happens to it."""
    model = view.models.get(name)
    if model is None:
        return NOW if tally.replicas else None
    asked = asked_for(view, model)
    loaded = -(-tally.sessions // model.concurrency)
    wanted = min(model.max_replicas, max(model.min_replicas, asked, loaded))
    if tally.cares or tally.live < wanted or tally.live > model.max_replicas or name in view.refusals:
        return NOW
    if tally.waiting and tally.live < model.max_replicas:
        return NOW
    return _next_seconds(view, name, tally)


def asked_for(view: View, model: Model) -> int:
    """Return how many replicas the requests that wait for a model fill; 0 = none waits."""
    demand = view.demands.get(model.name)
    return -(-demand.waiters // model.concurrency) if demand is not None else 0


def _next_seconds(view: View, name: ModelName, tally: Tally) -> float | None:
    """Return when a keep-alive ends or a forecast begins; None = neither will."""
    model, arrivals = view.models[name], view.arrivals.get(name)
    if not tally.live:
        prewarm = prewarm_window_seconds(model, arrivals)
        return prewarm[0] if prewarm is not None else None
    if tally.live <= model.min_replicas or name in view.demands or not tally.idle_since:
        return None
    keep_seconds = keep_alive_seconds(model, arrivals)
    return max(NOW, tally.idle_since[0] + keep_seconds) if keep_seconds >= 0 else None
