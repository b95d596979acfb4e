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
from services.controller.cluster_view.frozen import amender_of
from services.controller.cluster_view.view import Model, Replica, View
from stoker.ids import ModelName

NOW = 0.0
"""At every look."""
LIVE = (Standing.STARTING, Standing.READY)


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
        return _counted(
            self,
            self.replicas + (now is not None) - (was is not None),
            self.cares + new.cares - old.cares,
            self.live + new.live - old.live,
            self.waiting + new.waiting - old.waiting,
            self.sessions + new.sessions - old.sessions,
            idle,
        )

    def after_load(self, was: Replica, now: Replica, *, is_ready: bool) -> Tally:
        """Return the tally after nothing but the sessions of a reserved replica have changed.

        Args:
            was: As its node reported it before.
            now: As it does now.
            is_ready: It is good for sessions: it counts as idle where it has none.
        """
        idle = self.idle_since
        if is_ready:
            was_idle_since = None if was.sessions else was.idle_since_seconds
            now_idle_since = None if now.sessions else now.idle_since_seconds
            if was_idle_since != now_idle_since:
                idle = _with(_without(idle, was_idle_since), now_idle_since)
        waiting = (now.waiting_since_seconds is not None) - (was.waiting_since_seconds is not None)
        return _loaded(self, self.waiting + waiting, self.sessions + now.sessions - was.sessions, idle)


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


_counted = amender_of(Tally, "replicas", "cares", "live", "waiting", "sessions", "idle_since")
_loaded = amender_of(Tally, "waiting", "sessions", "idle_since")
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


def due_of(view: View, name: ModelName, tally: Tally) -> float | None:
    """Return from when on the model needs a look; None = not before something happens to it."""
    model = view.models.get(name)
    if model is None:
        return NOW if tally.replicas else None
    live, most = tally.live, model.max_replicas
    if tally.cares or live > most or (tally.waiting and live < most) or name in view.refusals:
        return NOW
    loaded = -(-tally.sessions // model.concurrency)
    if live < min(most, max(model.min_replicas, loaded)):
        return NOW
    is_asked_for = name in view.demands
    if is_asked_for and live < min(most, asked_for(view, model)):
        return NOW
    return _next_seconds(view, model, tally, is_asked_for=is_asked_for)


def asked_for(view: View, model: Model) -> int:
    """Return how many replicas the requests that wait for a model fill; 0 = none waits."""
    demand = view.demands.get(model.name)
    return -(-demand.waiters // model.concurrency) if demand is not None else 0


def _next_seconds(view: View, model: Model, tally: Tally, *, is_asked_for: bool) -> float | None:
    """Return when a keep-alive ends or a forecast begins; None = neither will."""
    arrivals = view.arrivals.get(model.name) if model.keep_alive_auto else None  # else nobody asks
    if not tally.live:
        prewarm = prewarm_window_seconds(model, arrivals)
        return prewarm[0] if prewarm is not None else None
    if tally.live <= model.min_replicas or is_asked_for or not tally.idle_since:
        return None
    keep_seconds = keep_alive_seconds(model, arrivals)
    return max(NOW, tally.idle_since[0] + keep_seconds) if keep_seconds >= 0 else None
