"""A copy engine without a device: copies happen late, in order, so that who forgets to wait is found out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from services.worker.weights.copy_engine import SEGMENT_BYTES, Locked, lock_range


class FakeMark:
    """A place in the fake's order."""

    def __init__(self, number: int, engine: FakeCopyEngine) -> None:
        self.number = number
        self._engine = engine

    def is_passed(self) -> bool:
        """See `Mark`."""
        return self._engine.done >= self.number


class FakeCopyEngine:
    """Keeps copies back until somebody joins or synchronises; the "device" is the processor.

    Args:
        longest_lock_bytes: Longer ranges are refused, as by a driver.
    """

    def __init__(
        self, *, longest_lock_bytes: int = SEGMENT_BYTES, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self.done = 0
        self.locked: list[int] = []
        self._longest_lock_bytes = longest_lock_bytes
        self._segment_bytes = segment_bytes
        self._asked: deque[Callable[[], object]] = deque()
        self._count = 0
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """See `CopyEngine`."""
        return torch.device("cpu")

    def lock(self, address: int, length: int) -> Locked:
        """See `CopyEngine`."""
        if length == 0:
            return Locked.NOT
        locked, addresses = lock_range(
            address,
            length,
            lock=lambda _, piece: piece <= self._longest_lock_bytes,
            unlock=lambda _: None,
            segment_bytes=self._segment_bytes,
        )
        self.locked += addresses
        return locked

    def allocate(self, byte_count: int) -> torch.Tensor:
        """See `CopyEngine`; filled with what no weight looks like."""
        return torch.full((byte_count,), 0xFF, dtype=torch.uint8)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """See `CopyEngine`."""
        self._ask(lambda: destination.copy_(source))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See `CopyEngine`."""
        self._run(self._count)
        yield

    def mark(self) -> FakeMark:
        """See `CopyEngine`."""
        return FakeMark(self._count, self)

    def join(self, mark: FakeMark) -> None:
        """See `CopyEngine`."""
        self._run(mark.number)

    def synchronize(self) -> None:
        """See `CopyEngine`."""
        self._run(self._count)

    def close(self) -> None:
        """See `CopyEngine`."""
        self.synchronize()
        self.locked.clear()

    def _ask(self, work: Callable[[], object]) -> None:
        with self._lock:
            self._asked.append(work)
            self._count += 1

    def _run(self, upto: int) -> None:
        with self._lock:
            while self.done < upto:
                self._asked.popleft()()
                self.done += 1
