"""Can a request with a deadline be met? Pure; what can't be is refused at once (Clockwork, OSDI '20).

Only an estimate refuses. A start on its way has one, and so has the best start that could be ordered now:
where even that comes too late none is ordered, and nothing is stopped or moved. Who waits for room has no
estimate, because nobody knows when a session ends; it waits until its deadline. A start that turned out too
slow for one request goes on: whoever asks again finds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.controller.answer import Answer, Queued, Starting
from services.controller.cluster_view.view import Policy, View
from services.controller.placement.place import Migrate, Placed, StopIdle, place
from stoker.ids import ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """The request can't be met: its replica is expected to be ready only in `ready_seconds`, from now.

    Attributes:
        ready_seconds: The best estimate.
        ordered: That start is on its way; else none was ordered.
        tier: Where the bytes of a start that was not ordered would come from, e.g. `disk`.
    """

    ready_seconds: float
    ordered: bool
    tier: str = ""


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
    if ready_at_seconds <= due_seconds:
        return None
    return Late(ready_seconds=ready_at_seconds - now_seconds, ordered=True)


def late_if_started(  # noqa: PLR0913 - what the answer depends on, each named by its caller
    view: View,
    name: ModelName,
    found: Answer,
    *,
    now_seconds: float,
    due_seconds: float,
    policy: Policy,
) -> Late | None:
    """Tell whether even the best start that could be ordered now comes too late; ask before ordering it.

    Args:
        view: The cluster; the request is not part of its demands yet.
        name: A deployed model.
        found: What the request would be told now.
        now_seconds: The view's clock.
        due_seconds: The request's deadline, on the same clock.
        policy: Constants of the decision.
    """
    if not isinstance(found, Queued) or name in view.demands:
        return None
    match place(view, name, now_seconds, policy):
        case Placed(estimate=estimate) | StopIdle(estimate=estimate) | Migrate(estimate=estimate):
            if now_seconds + estimate.total_seconds > due_seconds:
                return Late(ready_seconds=estimate.total_seconds, ordered=False, tier=estimate.tier)
        case _:
            pass
    return None
