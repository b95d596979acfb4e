"""What moves weights from the host's memory to a device, as a protocol, so that its users need none in tests.

Rules that every copy engine keeps:
1. Copies run in the order they were asked for, beside the caller and beside the device's computing.
2. A source must stay as it is until `synchronize`, or until a `Mark` made after the copy has been passed.
3. `join` makes the computing that the caller asks for next wait for a mark; it does not block the caller.
4. Page-locked memory is copied from directly; other memory goes through page-locked buffers: slower, never
   wrong.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from stoker.units import GIB

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

SEGMENT_BYTES = 64 * GIB
"""Most that is page-locked at once: one call for 512 GiB and more fails on current drivers (ServerlessLLM's
issues 237 and 242)."""


class Locked(Enum):
    """How a range of memory came to be page-locked."""

    WHOLE = "whole"
    SEGMENTS = "segments"
    NOT = "not"
    """Refused: copies from it go through buffers."""


class Mark(Protocol):
    """A point in a copy engine's order."""

    def is_passed(self) -> bool:
        """Tell whether everything asked for before it is done."""
        ...


class CopyEngine(Protocol):
    """Copies to one device."""

    @property
    def device(self) -> torch.device:
        """Return where copies go."""
        ...

    def lock(self, address: int, length: int) -> Locked:
        """Page-lock a mapped range of this process, as far as the driver lets it; blocks, about 0.1 s/GB.

        The range must be readable, shared (never private: locking a private page copies it) and stay mapped
        until `close`.
        """
        ...

    def allocate(self, byte_count: int) -> torch.Tensor:
        """Return bytes on the device.

        Raises:
            DoesNotFit: It has no room for them.
        """
        ...

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Ask for a copy of bytes, from the host to the device; both contiguous and of one length."""
        ...

    def computing(self) -> AbstractContextManager[None]:
        """Return a context in which torch's operations take their place in the order of copies."""
        ...

    def mark(self) -> Mark:
        """Return a mark after everything asked for so far."""
        ...

    def join(self, mark: Mark) -> None:
        """Make what this thread asks the device to compute from now on wait for the mark."""
        ...

    def synchronize(self) -> None:
        """Block until every copy is done."""
        ...

    def close(self) -> None:
        """Block until every copy is done and unlock what was locked."""
        ...


def segments(address: int, length: int, *, segment_bytes: int = SEGMENT_BYTES) -> list[tuple[int, int]]:
    """Return the pieces, address and length, to lock a range in when it can't be locked at once."""
    ends = [*range(address + segment_bytes, address + length, segment_bytes), address + length]
    starts = [address, *ends[:-1]]
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def lock_range(
    address: int,
    length: int,
    *,
    lock: Callable[[int, int], bool],
    unlock: Callable[[int], None],
    segment_bytes: int = SEGMENT_BYTES,
) -> tuple[Locked, list[int]]:
    """Lock a range whole, else in segments, else not at all.

    Args:
        address: Of its first byte.
        length: Bytes.
        lock: Locks a piece; False when the driver refuses.
        unlock: Takes a lock back, by its address.
        segment_bytes: Longest piece that is tried.

    Returns:
        What came of it, and the addresses to unlock in the end. A range that is locked in part is unlocked:
        whether a copy is fast must not depend on where a checkpoint happens to lie.
    """
    if length <= segment_bytes and lock(address, length):
        return Locked.WHOLE, [address]
    for size in (segment_bytes, segment_bytes // 4, segment_bytes // 16):
        done: list[int] = []
        for start, part in segments(address, length, segment_bytes=size):
            if not lock(start, part):
                break
            done.append(start)
        else:
            return Locked.SEGMENTS, done
        for start in done:
            unlock(start)
    return Locked.NOT, []
