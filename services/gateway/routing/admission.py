"""Admission: how much of a model's work one gateway takes on. Pure.

A model's ready replicas decode `batch_capacity` sessions at once; `max_queue` more may wait. What comes on
top is refused at once, so that a client learns it while it can still go elsewhere.
"""

from __future__ import annotations

from services.gateway.routing.routes import ModelRoute
from stoker.errors import QueueFull
from stoker.ids import ModelName

RETRY_AFTER_SECONDS = 1.0


class Admission:
    """Sessions this gateway has taken on, by model."""

    def __init__(self) -> None:
        self._sessions: dict[ModelName, int] = {}

    def enter(self, route: ModelRoute, sessions: int) -> None:
        """Take on a request's sessions; `leave` gives them back.

        Raises:
            QueueFull: The model's queue in this gateway has no room for them.
        """
        taken = self._sessions.get(route.name, 0)
        room = route.batch_capacity + route.max_queue
        if taken + sessions > room:
            raise QueueFull(
                f"the queue of model {route.name!r} is full in this gateway: {taken} sessions run or wait, "
                f"{room} are allowed, the request needs {sessions}; try again shortly",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        self._sessions[route.name] = taken + sessions

    def leave(self, model: ModelName, sessions: int) -> None:
        """Give back what `enter` took."""
        left = self._sessions.get(model, 0) - sessions
        if left > 0:
            self._sessions[model] = left
        else:
            self._sessions.pop(model, None)

    @property
    def sessions(self) -> int:
        """Return the sessions of all models."""
        return sum(self._sessions.values())
