"""Clocks: time is handed in, so that decisions and tests own it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from."""

    def now_seconds(self) -> float:
        """Return monotonic seconds; only differences mean something."""
        ...

    def unix_seconds(self) -> float:
        """Return seconds since 1970; for people and for other hosts, never for durations."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return once `now_seconds` has moved on by `seconds`; not before others have run."""
        ...


class SystemClock:
    """The host's clocks."""

    def now_seconds(self) -> float:
        """See `Clock`."""
        return time.monotonic()

    def unix_seconds(self) -> float:
        """See `Clock`."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """See `Clock`."""
        await asyncio.sleep(max(0.0, seconds))


class ManualClock:
    """A clock that stands still until it is told to advance: for tests and the simulator."""

    def __init__(self, start_seconds: float = 1_000_000.0) -> None:
        self._now_seconds = start_seconds
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now_seconds(self) -> float:
        """See `Clock`."""
        return self._now_seconds

    def unix_seconds(self) -> float:
        """See `Clock`."""
        return self._now_seconds

    async def sleep(self, seconds: float) -> None:
        """Wait until `advance` has passed this point."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        wake = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_seconds + seconds, next(self._order), wake))
        await wake

    def advance(self, seconds: float) -> None:
        """Move time forward and wake who slept that long; raises ValueError on a negative step."""
        if seconds < 0:
            raise ValueError(f"time does not go back: {seconds}")
        self._now_seconds += seconds
        while self._sleepers and self._sleepers[0][0] <= self._now_seconds:
            _, _, wake = heapq.heappop(self._sleepers)
            if not wake.done():
                wake.set_result(None)
