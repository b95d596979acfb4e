"""How fast keys and values leave a worker whose sessions go on. Pure.

What it takes to read a piece, to digest it and to hand it to the wire is processor time of this host: its
cores make the tokens, too. So after each piece as much time passes without shipping as leaves all sessions
that leave a share of it. That adapts by itself: where copies are quick, or cores idle, a share is many bytes.

A share that would be too late is raised: sessions that leave a node which is about to stop get what they need
to be gone in time, since what stays behind is computed again, at more than a longer step's cost.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.1
"""Of the time, in which only this worker's work counts. Agents, and a destination that shares the processors,
add more than as much again: docs/decisions/0024."""


@dataclass(slots=True, kw_only=True, eq=False)
class Departure:
    """One session's keys and values on their way out, in one call."""

    pieces_left: int
    until_seconds: float
    """When the last one should have gone; infinite = there is no hurry."""
    pieces_gone: int = 0
    spent_seconds: float = 0.0
    """What these took."""

    def needed_share(self, now_seconds: float) -> float:
        """Return which share of the time until its end it takes; above 1: it will be late."""
        work_seconds = self.pieces_left * self.spent_seconds / max(1, self.pieces_gone)
        return work_seconds / max(self.until_seconds - now_seconds, 1e-9)


class KvPace:
    """Says how long to wait after each piece.

    Args:
        share: Of the time, above 0, at most 1; 1 = never wait.
    """

    def __init__(self, share: float = SHARE) -> None:
        self._share = share
        self._departures: set[Departure] = set()
        self._free_seconds = float("-inf")

    def begin(self, pieces: int, until_seconds: float = float("inf")) -> Departure:
        """Take note of a session that is about to leave; `end` must follow."""
        departure = Departure(pieces_left=pieces, until_seconds=until_seconds)
        self._departures.add(departure)
        return departure

    def end(self, departure: Departure) -> None:
        """Forget a session that has left, or doesn't leave any more."""
        self._departures.discard(departure)

    def share(self, now_seconds: float) -> float:
        """Return the share of the time that shipping may take now, for all sessions that leave."""
        needed = sum(departure.needed_share(now_seconds) for departure in self._departures)
        return min(1.0, max(self._share, needed))

    def rest_seconds(self, departure: Departure, spent_seconds: float, now_seconds: float) -> float:
        """Take note of a piece that took so long until now; return how long to wait before the next one.

        Pieces of several sessions take turns: each waits for the others' rest, too.
        """
        departure.pieces_left -= 1
        departure.pieces_gone += 1
        departure.spent_seconds += spent_seconds
        rest = spent_seconds * (1 / self.share(now_seconds) - 1)
        self._free_seconds = max(self._free_seconds, now_seconds) + rest
        return self._free_seconds - now_seconds
