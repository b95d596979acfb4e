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

    def now(self) -> float:
        """Return the time."""
        return self.now_seconds

    def at(self, seconds: float, event: Callable[[], None]) -> None:
        """Have something happen at a moment; at once where it has passed."""
        heapq.heappush(self._events, (max(seconds, self.now_seconds), next(self._order), event))

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Have something happen in so many seconds."""
        self.at(self.now_seconds + seconds, event)

    def step(self) -> bool:
        """Let the next thing happen; False when nothing is left."""
        if not self._events:
            return False
        self.now_seconds, _, event = heapq.heappop(self._events)
        event()
        return True
