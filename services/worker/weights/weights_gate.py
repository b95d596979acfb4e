"""The gate between weights that arrive and forward passes that need them: stages open in order, or never.

Rules:
1. A pass waits before a stage that is not open; once all are open nothing waits and nothing is locked.
2. A failed load ends every wait with the load's error, at once and for ever.
3. `interrupt` ends the present wait, or the next one, with `PassInterrupted`: whoever drives the passes can
   then do what it was asked to, and makes the pass again. A pass leaves nothing behind that a second one
   does not overwrite. A pass that several processes make together can't be given up by one of them.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from stoker.errors import StokerError


class PassInterrupted(Exception):
    """The forward pass was given up while it waited for weights; make it again."""


class WeightsGate:
    """Opened by the thread that brings weights, waited at by the one that runs passes.

    Args:
        stages: How many there are.
        is_interruptible: Whether `interrupt` does anything.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, stages: int, *, is_interruptible: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stages = stages
        self._is_interruptible = is_interruptible
        self._clock = clock
        self._changed = threading.Condition()
        self._open = 0
        self._error: StokerError | None = None
        self._interrupted = False
        self._first_wait_seconds: float | None = None
        self._waiting_since_seconds: float | None = None
        self._stalled_seconds = 0.0

    @property
    def is_open(self) -> bool:
        """Tell whether all weights are there."""
        return self._open >= self._stages

    def has_opened(self, stages: int) -> bool:
        """Tell whether the first `stages` stages are open."""
        return self._open >= stages

    @property
    def error(self) -> StokerError | None:
        """Return why the weights will not come, if they won't."""
        return self._error

    def open(self, stages: int) -> None:
        """Open the first `stages` stages; fewer than before changes nothing."""
        with self._changed:
            self._open = max(self._open, stages)
            self._changed.notify_all()

    def fail(self, error: StokerError) -> None:
        """End all waits with the reason why the weights won't come; the first reason counts."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def interrupt(self) -> None:
        """End the wait that is under way, or the next one; nothing happens when all is open."""
        with self._changed:
            if self._is_interruptible and not self.is_open:
                self._interrupted = True
                self._changed.notify_all()

    def wait(self, stage: int) -> None:
        """Return when a stage, counted from 0, and all before it are open.

        Raises:
            PassInterrupted: Somebody has something else to do first.
            StokerError: The load failed.
        """
        if self.is_open:
            return
        with self._changed:
            if self._first_wait_seconds is None:
                self._first_wait_seconds = self._clock()
            self._waiting_since_seconds = self._clock()
            try:
                while self._open <= stage:
                    if self._error is not None:
                        raise self._error
                    if self._interrupted:
                        self._interrupted = False
                        raise PassInterrupted
                    self._changed.wait()
            finally:
                self._stalled_seconds += self._clock() - self._waiting_since_seconds
                self._waiting_since_seconds = None

    def overlap_seconds(self) -> float:
        """Return the time since the first pass came to the gate; 0 before."""
        with self._changed:
            return 0.0 if self._first_wait_seconds is None else self._clock() - self._first_wait_seconds

    def stall_seconds(self) -> float:
        """Return how long passes have waited so far, a wait that is under way included."""
        with self._changed:
            since_seconds = self._waiting_since_seconds
            waiting_seconds = 0.0 if since_seconds is None else self._clock() - since_seconds
            return self._stalled_seconds + waiting_seconds
