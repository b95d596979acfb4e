"""What to drop when room is needed. Pure.

Dropping a checkpoint costs `reload_seconds * likelihood of use`: the seconds a later request waits because
it is gone, times how probable that request is. Likelihood is a use count that halves every
`HALF_LIFE_SECONDS`. Cheapest per chunk freed goes first; what turns out not to be needed is spared. What is
leased, pinned or being read for someone who waits is never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

HALF_LIFE_SECONDS = 600.0
"""Ten minutes: of the order of a chat's pause; about the default keep-alive of a replica."""

_NEVER_USED_AGAIN = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Uses:
    """A decaying count of uses.

    Attributes:
        count: Uses, each worth half after `HALF_LIFE_SECONDS`, as of `at_seconds`.
        at_seconds: Monotonic.
    """

    count: float
    at_seconds: float

    def decayed(self, now_seconds: float) -> float:
        """Return the count as of now."""
        age = max(0.0, now_seconds - self.at_seconds)
        return self.count * math.exp2(-age / HALF_LIFE_SECONDS)

    def used(self, now_seconds: float) -> Uses:
        """Return the count with one use more."""
        return Uses(count=self.decayed(now_seconds) + 1.0, at_seconds=now_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """A checkpoint that takes room.

    Attributes:
        key: Which.
        chunks: How many it takes.
        reload_seconds: What bringing it back would take.
        uses: How it has been used.
        held: Leased, pinned, or waited for: stays.
        superseded: Its files have changed since: nobody can ask for it again.
    """

    key: int
    chunks: int
    reload_seconds: float
    uses: Uses
    held: bool
    superseded: bool = False


def choose_victims(
    occupants: Sequence[Occupant], *, need_chunks: int, now_seconds: float
) -> tuple[int, ...] | None:
    """Return the keys to drop so that at least `need_chunks` become free; None when that cannot be.

    Args:
        occupants: Everything that takes room.
        need_chunks: Beyond what is free; 0 or less needs nobody.
        now_seconds: Monotonic.
    """
    if need_chunks <= 0:
        return ()
    free_to_go = [occupant for occupant in occupants if not occupant.held and occupant.chunks]
    if sum(occupant.chunks for occupant in free_to_go) < need_chunks:
        return None
    chosen: list[Occupant] = []
    for occupant in sorted(free_to_go, key=lambda each: (_cost(each, now_seconds) / each.chunks, each.key)):
        if need_chunks <= sum(each.chunks for each in chosen):
            break
        chosen.append(occupant)
    return tuple(each.key for each in _spare_the_dear(chosen, need_chunks, now_seconds))


def _cost(occupant: Occupant, now_seconds: float) -> float:
    if occupant.superseded:
        return _NEVER_USED_AGAIN
    return occupant.reload_seconds * occupant.uses.decayed(now_seconds)


def _spare_the_dear(chosen: list[Occupant], need_chunks: int, now_seconds: float) -> list[Occupant]:
    """Return `chosen` without those that are not needed after all, the dearest spared first."""
    surplus = sum(each.chunks for each in chosen) - need_chunks
    kept = list(chosen)
    for occupant in sorted(chosen, key=lambda each: _cost(each, now_seconds), reverse=True):
        if occupant.chunks <= surplus:
            surplus -= occupant.chunks
            kept.remove(occupant)
    return kept
