"""A virtual clock: what is to happen, in order of time, and of asking where times are equal."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class VirtualClock:
    """Seconds from the start of the simulation; stands still while something happens."""

    def __init__(self) -> None:
        self.now_seconds = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._then: Callable[[], None] | None = None
        """What happens next, before anything in the list."""

    def now(self) -> float:
        """Return the time."""
        return self.now_seconds

    def at(self, seconds: float, event: Callable[[], None]) -> None:
        """Have something happen at a moment; at once where it has passed."""
        now_seconds = self.now_seconds
        at_seconds = max(now_seconds, seconds)
        heapq.heappush(self._events, (at_seconds, next(self._order), event))

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Have something happen in so many seconds."""
        self.at(self.now_seconds + seconds, event)

    def then(self, event: Callable[[], None]) -> None:
        """Have something happen when all that is to happen now has: mostly without the list."""
        if self._then is None and not (self._events and self._events[0][0] <= self.now_seconds):
            self._then = event
        else:
            self.after(0.0, event)

    def step(self) -> bool:
        """Let the next thing happen; False when nothing is left."""
        if self._then is not None:
            event, self._then = self._then, None
            event()
            return True
        if not self._events:
            return False
        self.now_seconds, _, event = heapq.heappop(self._events)
        event()
        return True
