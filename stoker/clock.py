"""Time as a value one passes in: a `Clock` for shells, so that tests and the simulator own the time.

Pure modules take `now_seconds` as an argument; only shells hold a clock.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from typing import Protocol


class Clock(Protocol):
    """What a shell needs of time."""

    def now_seconds(self) -> float:
        """Return seconds since an arbitrary point; never goes back, knows nothing of calendars."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`; at once (but not before others have run) when they are not positive."""
        ...


class SystemClock:
    """The host's monotonic clock."""

    def now_seconds(self) -> float:
        """Return the host's monotonic time."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Sleep on the event loop."""
        await asyncio.sleep(max(0.0, seconds))


class ManualClock:
    """A clock that moves only when `advance` says so; belongs to one event loop."""

    def __init__(self, now_seconds: float = 0.0) -> None:
        self._now_seconds = now_seconds
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now_seconds(self) -> float:
        """Return the time `advance` has reached."""
        return self._now_seconds

    async def sleep(self, seconds: float) -> None:
        """Wait until `advance` has passed this point."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        wake = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_seconds + seconds, next(self._order), wake))
        await wake

    async def advance(self, seconds: float) -> None:
        """Move on by `seconds`, waking sleepers in the order of their times, each at its own time."""
        end_seconds = self._now_seconds + seconds
        while self._sleepers and self._sleepers[0][0] <= end_seconds:
            wake_seconds, _, wake = heapq.heappop(self._sleepers)
            self._now_seconds = wake_seconds
            if not wake.done():
                wake.set_result(None)
            for _ in range(8):  # let the woken task reach its next await, and those that it wakes
                await asyncio.sleep(0)
        self._now_seconds = end_seconds
