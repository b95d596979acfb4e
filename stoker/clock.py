"""Clocks: time is handed in, so that decisions and tests own it."""

from __future__ import annotations

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


class SystemClock:
    """The host's clocks."""

    def now_seconds(self) -> float:
        """See `Clock`."""
        return time.monotonic()

    def unix_seconds(self) -> float:
        """See `Clock`."""
        return time.time()


class ManualClock:
    """A clock that stands still until it is told to advance: for tests and the simulator."""

    def __init__(self, start_seconds: float = 1_000_000.0) -> None:
        self._now_seconds = start_seconds

    def now_seconds(self) -> float:
        """See `Clock`."""
        return self._now_seconds

    def unix_seconds(self) -> float:
        """See `Clock`."""
        return self._now_seconds

    def advance(self, seconds: float) -> None:
        """Move time forward; raises ValueError on a negative step."""
        if seconds < 0:
            raise ValueError(f"time does not go back: {seconds}")
        self._now_seconds += seconds
