"""How long an engine's steps take, and whether the one that runs is late. Pure.

A step that takes much longer than those before waits for its processor, mostly: whatever else this worker
could do in that time should wait, too.
"""

from __future__ import annotations

from statistics import median

KNOWN_STEPS = 15
"""So many of the latest ones say what is usual."""
FEWEST_STEPS = 5
"""Before there are so many, no step is late."""
LATE = 1.25
"""Times the usual duration. SmolLM2's undisturbed steps on two busy cores took 0.9 to 1.2 of their median."""


class StepTimes:
    """Belongs to the engine's thread; any thread may ask."""

    def __init__(self) -> None:
        self._latest_seconds: tuple[float, ...] = ()  # replaced, never changed: others read it
        self._began_seconds: float | None = None

    def begin(self, now_seconds: float) -> None:
        """Take note of a step that begins."""
        self._began_seconds = now_seconds

    def end(self, now_seconds: float) -> None:
        """Take note of its end."""
        began_seconds, self._began_seconds = self._began_seconds, None
        if began_seconds is not None:
            latest = (*self._latest_seconds, now_seconds - began_seconds)
            self._latest_seconds = latest[-KNOWN_STEPS:]

    @property
    def is_stepping(self) -> bool:
        """Say whether a step is under way."""
        return self._began_seconds is not None

    def is_late(self, now_seconds: float) -> bool:
        """Say whether the step under way has taken longer than steps usually do."""
        began_seconds, latest = self._began_seconds, self._latest_seconds
        if began_seconds is None or len(latest) < FEWEST_STEPS:
            return False
        return now_seconds - began_seconds > LATE * median(latest)
