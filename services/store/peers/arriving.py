"""A chunk whose bytes are coming in, for those who send them on meanwhile. Any thread.

Whoever fetches the chunk tells how far it is; senders wait for more and send it from where it lies. "Whole"
is said only of bytes that were checked, as far as they can be here; until then nobody uses what was sent on.
"""

from __future__ import annotations

import threading


class Arriving:
    """One fetch of one chunk.

    Attributes:
        memory: Its bytes in the pool, as long as the chunk's; the first `ready_bytes` are there.
    """

    def __init__(self, memory: memoryview) -> None:
        """Nothing is there yet."""
        self.memory = memory
        self._changed = threading.Condition()
        self._ready_bytes = 0
        self._whole: bool | None = None

    def advance(self, ready_bytes: int) -> None:
        """Note that the first so many bytes are there."""
        with self._changed:
            if ready_bytes > self._ready_bytes and self._whole is None:
                self._ready_bytes = ready_bytes
                self._changed.notify_all()

    def end(self, *, whole: bool) -> None:
        """Note that the fetch has ended; only the first end counts.

        Args:
            whole: All bytes are there and right; else they are to be had from somewhere else.
        """
        with self._changed:
            if self._whole is not None:
                return
            self._whole = whole
            if whole:
                self._ready_bytes = len(self.memory)
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """Whether the fetch has."""
        return self._whole is not None

    def after(self, sent_bytes: int, *, seconds: float) -> tuple[int, bool | None]:
        """Wait for more than `sent_bytes`; returns how many bytes are there, and whether the chunk is whole.

        The second is None while the fetch goes on. After `seconds` there may be no more than before.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._ready_bytes > sent_bytes or self._whole is not None, timeout=seconds
            )
            return self._ready_bytes, self._whole
