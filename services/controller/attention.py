"""When `reconcile` must look at a model next: never later than something is to be done about it. Pure.

It may be too early, which costs a look; policy and time stay out of it, so that it holds until the model, its
demand or one of its replicas changes.
"""

from __future__ import annotations

from services.controller.fleet import Member, Standing, is_idle, member
from services.controller.forecast import keep_alive_seconds, prewarm_window_seconds
from services.controller.view import Model, Reservation, Scheduling, View
from stoker.ids import ModelName

NOW = 0.0
"""At every look."""


def due_of(view: View, name: ModelName, reservations: tuple[Reservation, ...]) -> float | None:
    """Return from when on the model needs a look; None = not before something happens to it."""
    model = view.models.get(name)
    members = [member(view, reservation) for reservation in reservations]
    if model is None:
        return NOW if members else None
    if any(_needs_care(view, found) for found in members):
        return NOW
    live = sum(found.standing in (Standing.STARTING, Standing.READY) for found in members)
    if _wants_more(view, model, members, live) or live > model.max_replicas or name in view.refusals:
        return NOW
    return _next_seconds(view, model, members, live)


def _needs_care(view: View, found: Member) -> bool:
    """Tell whether a replica is in a state that rules other than keep-alive are about."""
    if found.standing not in (Standing.READY, Standing.STARTING) or found.stale:
        return True
    if found.reservation.moving_to is not None or found.node is None:
        return True
    if found.replica is None:
        return True  # ordered and not reported yet: given up after a grace
    return view.scheduling.get(found.reservation.node_id) is Scheduling.DRAINED


def _wants_more(view: View, model: Model, members: list[Member], live: int) -> bool:
    if live >= model.max_replicas:
        return False
    sessions = sum(found.replica.sessions for found in members if found.replica is not None)
    if any(found.replica and found.replica.waiting_since_seconds is not None for found in members):
        return True
    asked = 1 if model.name in view.demands else 0
    return live < max(model.min_replicas, asked, -(-(sessions + 1) // model.concurrency) if sessions else 0)


def _next_seconds(view: View, model: Model, members: list[Member], live: int) -> float | None:
    """Return when a keep-alive ends or a forecast begins; None = neither will."""
    arrivals = view.arrivals.get(model.name)
    if not live:
        prewarm = prewarm_window_seconds(model, arrivals)
        return prewarm[0] if prewarm is not None else None
    if live <= model.min_replicas or model.name in view.demands:
        return None
    keep_seconds = keep_alive_seconds(model, arrivals)
    if keep_seconds < 0:
        return None
    idle = [found.replica.idle_since_seconds or 0.0 for found in members if is_idle(found) and found.replica]
    return max(NOW, min(idle) + keep_seconds) if idle else None
