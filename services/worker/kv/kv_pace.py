"""How fast keys and values leave a worker whose sessions go on: a share of the time, for all of them.

What it takes to read a piece, to digest it and to hand it to the wire is processor time of this host: its
cores make the tokens, too. So after each piece as much time passes without shipping as leaves it its share.
That adapts by itself: where copies are quick, or cores idle, a share is many bytes. Pure.
"""

from __future__ import annotations

SHARE = 0.2
"""Of the time. Measured on two cores that also ran the destination: docs/decisions/0024 has the table."""


class KvPace:
    """Says how long to wait after each piece.

    Args:
        share: Of the time, above 0; 1 = never wait.
    """

    def __init__(self, share: float = SHARE) -> None:
        self._rest_per_second = 1 / share - 1
        self._free_seconds = float("-inf")

    def rest_seconds(self, spent_seconds: float, now_seconds: float) -> float:
        """Take note of a piece that took so long until now; return how long to wait before the next one.

        Pieces of several sessions take turns: each waits for the others' rest, too.
        """
        self._free_seconds = max(self._free_seconds, now_seconds) + spent_seconds * self._rest_per_second
        return self._free_seconds - now_seconds
