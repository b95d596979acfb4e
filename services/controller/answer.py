"""What a request that needs a replica is told now: `answer(view, name, …) -> Answer`, pure."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from services.controller.cluster_view.demand import Failure
from services.controller.cluster_view.fleet import Member, Standing, members_of
from services.controller.cluster_view.view import View
from stoker.ids import ModelName

NEAR_NAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Go there."""

    member: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class Starting:
    """A replica is on its way."""

    member: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """No replica is on its way yet, and why."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """It won't be served; `retry_after_seconds` None = trying again won't help."""

    code: str
    message: str
    retry_after_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """No such model; `near` are names that look like it."""

    near: tuple[str, ...]


Answer = Ready | Starting | Queued | Failed | Unknown


class State(Enum):
    """What a model is to its users; as `ModelState` in the protos."""

    COLD = "cold"
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A model's state, why, and how many replicas are ready and starting."""

    state: State
    message: str
    ready: int
    starting: int


def answer(view: View, name: ModelName, *, since_seconds: float, now_seconds: float) -> Answer:
    """Decide what a request for `name`, waiting since `since_seconds`, is told.

    The first that applies: unknown model; a ready replica (of the current deployment before an older one,
    the fewest sessions first); a start on its way; a start that failed for good while the request waited,
    or whose back-off is not over; a placement that can never succeed; waiting, with the reason.
    """
    if name not in view.models:
        return Unknown(near=near_names(name, list(view.models)))
    members = members_of(view, name)
    ready = [found for found in members if is_offered(view, found)]
    if ready:
        return Ready(member=min(ready, key=_preference))
    starting = [found for found in members if found.standing is Standing.STARTING and not found.stale]
    if starting:
        return Starting(member=max(starting, key=_progress))
    failure = view.failures.get(name)
    if failure is not None and _is_told(failure, since_seconds, now_seconds):
        return Failed(
            code=failure.code,
            message=f"model {name} could not be started: {failure.message}",
            retry_after_seconds=max(1.0, failure.retry_at_seconds - now_seconds),
        )
    refusal = view.refusals.get(name)
    if refusal is not None and refusal.code:
        return Failed(code=refusal.code, message=refusal.reason, retry_after_seconds=None)
    return Queued(reason=refusal.reason if refusal else _why_not_yet(failure))


def is_offered(view: View, found: Member) -> bool:
    """Tell whether requests may be sent to the replica."""
    if found.node is not None and found.node.draining:
        return False  # its agent refuses new sessions
    return found.standing is Standing.READY and found.reservation.replica_id not in view.distrusted


def near_names(name: str, names: Collection[str]) -> tuple[str, ...]:
    """Return deployed names that look like `name`, the nearest first."""
    return tuple(difflib.get_close_matches(name, names, n=NEAR_NAMES))


def status(view: View, name: ModelName, now_seconds: float) -> Status:
    """Return the state of a deployed model."""
    members = members_of(view, name)
    ready = sum(found.standing is Standing.READY for found in members)
    starting = sum(found.standing is Standing.STARTING for found in members)
    failure, refusal = view.failures.get(name), view.refusals.get(name)
    state, message = State.COLD, ""
    if ready:
        state = State.READY
    elif starting:
        state = State.STARTING
    elif refusal is not None:
        state, message = State.WAITING, refusal.reason
    elif failure is not None:
        state = State.FAILED
        rest_seconds = failure.retry_at_seconds - now_seconds
        again = f"; tried again on request after {rest_seconds:.0f} s" if rest_seconds > 0 else ""
        message = f"{failure.message}{again}"
    return Status(state=state, message=message, ready=ready, starting=starting)


def _preference(found: Member) -> tuple[bool, int, str]:
    sessions = found.replica.sessions if found.replica else 0
    return (found.stale, sessions, found.reservation.replica_id)


def _is_told(failure: Failure, since_seconds: float, now_seconds: float) -> bool:
    """Tell whether a request that waits since then ends with the failure."""
    return failure.is_final and (
        failure.at_seconds >= since_seconds or failure.retry_at_seconds > now_seconds
    )


def _why_not_yet(failure: Failure | None) -> str:
    if failure is None or failure.is_final:
        return "its start is being decided"
    return f"its start failed and is tried again: {failure.message}"


def _progress(found: Member) -> tuple[float, str]:
    return (found.replica.loaded_fraction if found.replica else 0.0, found.reservation.replica_id)
