"""What is asked for and not there: requests that wait, starts that failed, placements that were refused."""

from __future__ import annotations

from dataclasses import dataclass

MAX_WAITED_SECONDS = 86_400.0
"""Nobody is believed to have waited longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Requests that wait for a model.

    Attributes:
        since_seconds: When the first of them began to, wherever that was.
        waiters: How many; ≥ 1.
        longest_since_seconds: Likewise, with what they had waited before they were served and interrupted;
            None = as `since_seconds`.
    """

    since_seconds: float
    waiters: int
    longest_since_seconds: float | None = None

    @property
    def urgent_since_seconds(self) -> float:
        """Return since when who has waited longest does, all its waits counted as one."""
        return self.since_seconds if self.longest_since_seconds is None else self.longest_since_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The last starts of a model failed.

    Attributes:
        count: In a row.
        at_seconds: When the last one did.
        retry_at_seconds: No start before then.
        code: An error code of `stoker.errors`.
        message: Why.
        is_final: Requests that wait are told; False: it is tried once more for them.
    """

    count: int
    at_seconds: float
    retry_at_seconds: float
    code: str
    message: str
    is_final: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a wanted replica could not be placed.

    Attributes:
        reason: For people; says nothing that changes while the model waits.
        code: Set when it never can be placed: names the error.
        at_seconds: Since when.
        disturbs: It was looked for room that others would have had to make.
        retry_at_seconds: Time alone may make room then; None = only a change does.
        room_for: Room is being made for so many replicas at least, and who lacks more is looked at again;
            0 = none is, or no more can be made.
    """

    reason: str
    code: str = ""
    at_seconds: float = 0.0
    disturbs: bool = False
    retry_at_seconds: float | None = None
    room_for: int = 0


def demanded(
    before: Demand | None, waited_seconds: float, earlier_waits_seconds: float, now_seconds: float
) -> Demand:
    """Return what is asked of a model after one more request begins to wait here; see `Demanded`."""
    since_seconds = began_seconds(waited_seconds - max(0.0, earlier_waits_seconds), now_seconds)
    longest_since_seconds = min(since_seconds, began_seconds(waited_seconds, now_seconds))
    if before is not None:
        since_seconds = min(before.since_seconds, since_seconds)
        longest_since_seconds = min(before.urgent_since_seconds, longest_since_seconds)
    return Demand(
        since_seconds=since_seconds,
        waiters=before.waiters + 1 if before is not None else 1,
        longest_since_seconds=longest_since_seconds,
    )


def began_seconds(waited_seconds: float, now_seconds: float) -> float:
    """Return when a wait began that has lasted so long, as somebody else says: never in the future."""
    return now_seconds - min(MAX_WAITED_SECONDS, max(0.0, waited_seconds))
