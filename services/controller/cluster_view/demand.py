"""What is asked for and not there: requests that wait, starts that failed, placements that were refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Requests that wait for a model.

    Attributes:
        since_seconds: When the first of them began to.
        waiters: How many; ≥ 1.
    """

    since_seconds: float
    waiters: int


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
