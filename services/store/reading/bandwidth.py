"""How fast each tier is, learnt from what was moved. Pure.

A tier is busy while at least one read from it runs; its rate is bytes over busy time, taken in samples of
some size, because one chunk says little (several threads share the disk). The estimate is the median of the
last samples: one hiccup of a noisy disk does not move it. Reads of one sample run beside those of the sample
before; time that one has counted the next does not count again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from stoker.checkpoint.reading import ReadPart
from stoker.units import MIB

SAMPLE_BYTES = 64 * MIB
WINDOW = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What one tier moved: bytes, and the seconds in which it was moving any."""

    tier: str
    byte_count: int
    seconds: float


def moved_by_tier(parts: Iterable[ReadPart]) -> tuple[Moved, ...]:
    """Return bytes and busy seconds per tier; overlapping reads count their time once."""
    by_tier: dict[str, list[ReadPart]] = {}
    for part in parts:
        by_tier.setdefault(part.tier, []).append(part)
    return tuple(
        Moved(tier=tier, byte_count=sum(part.byte_count for part in found), seconds=_busy_seconds(found))
        for tier, found in sorted(by_tier.items())
    )


def span_seconds(parts: Iterable[ReadPart]) -> float:
    """Return the time from the first read's begin to the last one's end; 0 for none."""
    found = list(parts)
    began = min((part.began_seconds for part in found), default=0.0)
    return max((part.ended_seconds for part in found), default=0.0) - began


def _busy_seconds(parts: list[ReadPart], *, since_seconds: float = float("-inf")) -> float:
    """Return the time in which any of the reads ran, from `since_seconds` on."""
    busy, until = 0.0, since_seconds
    for part in sorted(parts, key=lambda part: part.began_seconds):
        busy += max(0.0, part.ended_seconds - max(until, part.began_seconds))
        until = max(until, part.ended_seconds)
    return busy


class RunningRates:
    """The learnt rate of each tier."""

    def __init__(self) -> None:
        self._pending: dict[str, list[ReadPart]] = {}
        self._pending_bytes: Counter[str] = Counter()
        self._rates: dict[str, deque[float]] = {}
        self._counted_until: dict[str, float] = {}

    def add(self, parts: Iterable[ReadPart]) -> None:
        """Learn from reads, of all loads together, as they end."""
        for part in parts:
            self._pending.setdefault(part.tier, []).append(part)
            self._pending_bytes[part.tier] += part.byte_count
            if self._pending_bytes[part.tier] >= SAMPLE_BYTES:
                self._sample(part.tier)

    def flush(self) -> None:
        """Make a sample of what is pending, however small: a load ended and nothing else may come."""
        for tier in list(self._pending):
            if not self._rates.get(tier):
                self._sample(tier)

    def bytes_per_second(self, tier: str) -> float | None:
        """Return the estimate; None when nothing was moved yet."""
        rates = self._rates.get(tier)
        return median(rates) if rates else None

    def all(self) -> dict[str, float]:
        """Return the estimate of every tier that has one."""
        return {tier: median(rates) for tier, rates in self._rates.items() if rates}

    def tiers(self) -> tuple[str, ...]:
        """Return the tiers that have an estimate."""
        return tuple(sorted(tier for tier, rates in self._rates.items() if rates))

    def _sample(self, tier: str) -> None:
        parts = self._pending.pop(tier, [])
        byte_count = self._pending_bytes.pop(tier, 0)
        busy = _busy_seconds(parts, since_seconds=self._counted_until.get(tier, float("-inf")))
        if busy > 0:
            rates = self._rates.setdefault(tier, deque(maxlen=WINDOW))
            rates.append(byte_count / busy)
            self._counted_until[tier] = max(part.ended_seconds for part in parts)
