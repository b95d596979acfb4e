"""Tiers made slower on purpose: bytes per second that a tier's reads may not exceed, for tests and demos.

Theory of operation: a paced tier is one link that serves its reads in turn. A read of `n` bytes that began at
`t` ends no sooner than the link is done with it: `free = max(free, t) + n / rate`. There is no burst, so any
number of threads share exactly the rate, and what is read slower than that by itself is not slowed further.
A read is held back after its bytes have come and before anyone is told, so everything behind it (ready
counters, learnt bandwidths, timings) sees the paced speed. `Link` is pure; `Pace` waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

from services.store.origins.source import REMOTE
from services.store.peers.source import PEER
from stoker.checkpoint.reading import DISK, PAGE_CACHE, ReadPart


class PacedTier(StrEnum):
    """What can be paced."""

    DISK = "disk"
    """This host's file systems, the page cache included: files of a test or demo are always in it."""
    PEER = PEER
    REMOTE = REMOTE


_PACED_AS = {
    DISK: PacedTier.DISK,
    PAGE_CACHE: PacedTier.DISK,
    PEER: PacedTier.PEER,
    REMOTE: PacedTier.REMOTE,
}


class Link:
    """When a link of some speed is done with each of its reads; not thread safe.

    Args:
        bytes_per_second: Above 0.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._free_seconds = float("-inf")

    def done_seconds(self, byte_count: int, began_seconds: float) -> float:
        """Take a read of `byte_count` bytes that began then; returns when the link has moved it."""
        begins = max(self._free_seconds, began_seconds)
        self._free_seconds = begins + byte_count / self._bytes_per_second
        return self._free_seconds


class Pace:
    """Holds reads back to their tiers' speeds; used from reader threads.

    Args:
        bytes_per_second: By tier; tiers that are not named, or at 0, are not paced.
    """

    def __init__(self, bytes_per_second: Mapping[PacedTier, float]) -> None:
        self._links = {tier: Link(rate) for tier, rate in bytes_per_second.items() if rate > 0}
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def hold(self, parts: Sequence[ReadPart]) -> list[ReadPart]:
        """Return the parts as they end at their tiers' speeds, once they have; blocks until then.

        After `close` it returns at once.
        """
        if not self._links:
            return list(parts)
        with self._lock:
            paced = [self._paced(part) for part in parts]
        until_seconds = max((part.ended_seconds for part in paced), default=0.0)
        self._closed.wait(max(0.0, until_seconds - time.monotonic()))
        return paced

    def close(self) -> None:
        """Let go of all reads that are held back."""
        self._closed.set()

    def _paced(self, part: ReadPart) -> ReadPart:
        tier = _PACED_AS.get(part.tier)
        link = self._links.get(tier) if tier is not None else None
        if link is None:
            return part
        done = link.done_seconds(part.byte_count, part.began_seconds)
        return replace(part, ended_seconds=max(part.ended_seconds, done))
