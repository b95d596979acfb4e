"""How long a session has waited to be served, all its waits counted as one. Pure.

Node agents and controllers are told it as a duration, so that no two clocks are compared: who is sent to
another queue, or asks another controller, is no newcomer there. Whoever is served tells 0.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """A session's waits.

    Attributes:
        since_seconds: When the present one began, by the gateway's clock; None = the session is served.
        earlier_seconds: All those that have ended.
    """

    since_seconds: float | None = None
    earlier_seconds: float = 0.0

    def seconds(self, now_seconds: float) -> float:
        """Return how long it has waited in all if it waits now; 0 while it is served."""
        if self.since_seconds is None:
            return 0.0
        return self.earlier_seconds + max(0.0, now_seconds - self.since_seconds)

    def served(self, now_seconds: float) -> Waited:
        """Return it as of a token."""
        if self.since_seconds is None:
            return self
        return Waited(earlier_seconds=self.seconds(now_seconds))

    def interrupted(self, now_seconds: float) -> Waited:
        """Return it as of a failure of its replica; who waited goes on waiting."""
        if self.since_seconds is not None:
            return self
        return Waited(since_seconds=now_seconds, earlier_seconds=self.earlier_seconds)
