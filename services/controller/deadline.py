"""Can a request with a deadline be met? Pure; what can't be is refused at once (Clockwork, OSDI '20).

Only an estimate refuses: a start on its way has one. Who waits for room has none, because nobody knows when a
session ends; it waits until its deadline. The start that was too slow goes on: whoever asks again finds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.controller.answer import Answer, Starting


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """The request can't be met: its replica is expected to be ready only in `ready_seconds`, from now."""

    ready_seconds: float


def late(found: Answer, *, now_seconds: float, due_seconds: float) -> Late | None:
    """Tell whether what a request waits for comes too late.

    Args:
        found: What the request is told now.
        now_seconds: The view's clock.
        due_seconds: The request's deadline, on the same clock.
    """
    if not isinstance(found, Starting):
        return None
    reservation = found.member.reservation
    ready_at_seconds = reservation.seen_seconds + reservation.predicted_seconds
    return Late(ready_seconds=ready_at_seconds - now_seconds) if ready_at_seconds > due_seconds else None
