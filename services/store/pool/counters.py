"""Ready counters: one uint64 per file, in memory that attached workers see; written by the daemon alone."""

from __future__ import annotations

import mmap
import os

from stoker.errors import CapacityError
from stoker.units import align_up

COUNTER_BYTES = 8


class ReadyCounters:
    """Slots of a shared page or more; not thread safe: the event loop's own."""

    def __init__(self, slots: int) -> None:
        """Make room for at least `slots` counters, all zero."""
        length = align_up(slots * COUNTER_BYTES, mmap.PAGESIZE)
        self._descriptor = os.memfd_create("stoker-ready", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, length)
        self._memory = mmap.mmap(self._descriptor, length)
        self._values = memoryview(self._memory).cast(
            "Q"
        )  # one aligned 8-byte store each: readers see no halves
        self._free = list(range(length // COUNTER_BYTES - 1, -1, -1))

    def take(self, count: int) -> tuple[int, ...]:
        """Return slots at zero.

        Raises:
            CapacityError: Too few are left.
        """
        if count > len(self._free):
            raise CapacityError(
                f"{count} weights files need a ready counter each, {len(self._free)} are free; "
                "convert the checkpoint (one file per rank) or raise STOKER_STORE_POOL_BYTES"
            )
        slots = tuple(self._free.pop() for _ in range(count))
        for slot in slots:
            self._values[slot] = 0
        return slots

    def give_back(self, slots: tuple[int, ...]) -> None:
        """Make slots free; nobody may be reading them."""
        self._free.extend(reversed(slots))

    def set(self, slot: int, ready_bytes: int) -> None:
        """Publish how many bytes are there, counted from the start of the file."""
        self._values[slot] = ready_bytes

    def get(self, slot: int) -> int:
        """Return what was published."""
        return self._values[slot]

    def offset(self, slot: int) -> int:
        """Return where a slot is in the descriptor, in bytes."""
        return slot * COUNTER_BYTES

    def read_only_descriptor(self) -> int:
        """Return a descriptor for others; the caller closes it."""
        return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Give the memory back; workers that mapped it keep it."""
        self._values.release()
        self._memory.close()
        os.close(self._descriptor)
