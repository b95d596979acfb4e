"""Which controller to report to next, while the leading one is not known. Pure.

1. Controllers are asked in turn, one after the other without a pause.
2. One that does not lead may name who does: that one is asked next, once; what it names is not followed.
3. After each round in which none would have us there is a pause: none leads until the dead leader's lease is
   over. The longest pause is what finding the new leader may cost at most, so it is short.
"""

from __future__ import annotations

from collections.abc import Sequence

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 0.5


class LeaderSearch:
    """The search of one agent.

    Args:
        controllers: `host:port` of each, at least one.

    Attributes:
        address: Whom to ask now.
    """

    def __init__(self, controllers: Sequence[str]) -> None:
        self._controllers = tuple(controllers)
        self._turn = 0
        self._is_named = False
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self.address = self._controllers[0]

    def found(self) -> None:
        """The controller took a report: it leads."""
        self._pause_seconds = FIRST_PAUSE_SECONDS

    def failed(self, named: str = "") -> float:
        """Go on to the next controller; returns the seconds to wait before it is asked.

        Args:
            named: The leader that a refusal named.
        """
        if named and named != self.address and not self._is_named:
            self.address, self._is_named = named, True
            return 0.0
        self._is_named = False
        self._turn = (self._turn + 1) % len(self._controllers)
        self.address = self._controllers[self._turn]
        if self._turn:
            return 0.0
        pause_seconds = self._pause_seconds
        self._pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
        return pause_seconds
