"""Hops: may a session go on elsewhere after a failure, and when? `after(...) -> GoOn | GiveUp`, pure.

Rules, in order:
1. What the request itself caused, or its deadline, ends it.
2. A session nobody has seen a token of is tried on `max_attempts` replicas; a lack of room ends it at once,
   so that the client may turn to somebody else.
3. A stream that has begun goes on as long as there is hope: replicas that died under it without giving a
   token are counted (`max_attempts` in a row: the request may be what kills them), so are its hops in all
   (`max_hops`), and a search that lasts `resume_timeout_seconds` is over. Places that refuse it, for want of
   room or because they are gone, cost only time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.gateway.routing.routes import Replica
from services.gateway.sessions.move_rounds import LONG_SESSION_TOKENS
from stoker.errors import (
    CapacityError,
    ContextLengthExceeded,
    DeadlineExceeded,
    LoadFailed,
    PeerError,
    ReplicaGone,
    StokerError,
    StreamLost,
    WorkerDied,
)
from stoker.ids import ReplicaId

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
"""Between two tries to find a place; a refusal that names a time is tried again then, or after this."""

REMEMBERED_FAILURES = 32
"""Replicas that a search passes over, the latest; a controller takes 64 names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopPolicy:
    """What the operator allows."""

    max_attempts: int = 6
    """Replicas in a row that may die under a session without giving it a token."""
    max_hops: int = 64
    """Times one session may change its replica."""
    resume_timeout_seconds: float = 120.0
    """Longest search for a replica that goes on with a stream."""
    ships_kv: bool = True
    """Planned moves ship keys and values; False: they compute them from the tokens."""
    long_session_tokens: int = LONG_SESSION_TOKENS
    """From so many tokens on all keys and values are shipped, the last ones while the source stands still."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hops:
    """What a session has been through."""

    count: int = 0
    """Replicas it has lost."""
    fruitless: int = 0
    """Replicas in a row that were lost without giving it a token."""
    refusals: int = 0
    """In a row, since it last ran."""
    tokens: int = 0
    """It had at the last failure."""
    since_seconds: float | None = None
    """When the search that goes on began; None = it runs."""
    failed: tuple[ReplicaId, ...] = ()
    """Replicas to pass over, the latest last."""

    def running(self) -> Hops:
        """Return it as of a new token."""
        return replace(self, since_seconds=None, refusals=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoOn:
    """Look for a replica after `pause_seconds`."""

    hops: Hops
    pause_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """End the request with this."""

    error: StokerError


def after(  # noqa: PLR0913 - the facts of one failure, all of them values
    hops: Hops,
    error: StokerError,
    *,
    at: Replica | None,
    tokens: int,
    begun: bool,
    whole: bool = False,
    now_seconds: float,
    policy: HopPolicy,
) -> GoOn | GiveUp:
    """Decide what follows a failure.

    Args:
        hops: Before it.
        error: What failed.
        at: The replica it was sent to; None = none was found.
        tokens: How many the session has.
        begun: The client has seen something of this request, or would have if it did not want the whole.
        whole: The client gets the answer in one piece.
        now_seconds: Monotonic time.
        policy: What the operator allows.
    """
    if not _hopeful(error, begun=begun, found=at is not None):
        return GiveUp(error=error)
    is_dead = at is not None and not isinstance(error, ReplicaGone | CapacityError | ContextLengthExceeded)
    is_fruitful = tokens > hops.tokens
    begins = hops.since_seconds is None or is_fruitful or is_dead
    since_seconds = now_seconds if begins else hops.since_seconds
    has_failed = at is not None and not isinstance(error, CapacityError)
    counts = is_dead or (has_failed and not begun)
    after_it = Hops(
        count=hops.count + counts,
        fruitless=counts if is_fruitful else hops.fruitless + counts,
        refusals=0 if is_dead else hops.refusals + 1,
        tokens=tokens,
        since_seconds=since_seconds,
        failed=(*hops.failed, at.replica_id)[-REMEMBERED_FAILURES:] if at and has_failed else hops.failed,
    )
    if why := _exhausted(after_it, now_seconds, policy):
        return GiveUp(error=_lost(error, after_it, why, whole=whole) if begun else error)
    return GoOn(hops=after_it, pause_seconds=_pause_seconds(after_it, error))


def redeployed(model: str, tokens: int) -> StreamLost:
    """Return the error of a stream whose weights are not served any more."""
    return StreamLost(
        f"the answer was cut off after {tokens} tokens: model {model!r} was deployed anew and its earlier "
        "weights are gone; send the request again",
        details={"tokens": tokens},
    )


def _hopeful(error: StokerError, *, begun: bool, found: bool) -> bool:
    """Say whether another try may do better."""
    if isinstance(error, DeadlineExceeded):
        return begun and not found  # the search's own; the request's comes from the stream
    if isinstance(error, StreamLost):
        return False
    if begun:
        return isinstance(error, PeerError | CapacityError | ContextLengthExceeded)
    return found and (isinstance(error, ReplicaGone | WorkerDied) or type(error) is PeerError)


def _exhausted(hops: Hops, now_seconds: float, policy: HopPolicy) -> str:
    if hops.fruitless >= policy.max_attempts:
        return f"{hops.fruitless} replicas in a row failed under it"
    if hops.count > policy.max_hops:
        return f"it has lost {hops.count} replicas, more than {policy.max_hops}"
    if hops.since_seconds is not None and now_seconds - hops.since_seconds >= policy.resume_timeout_seconds:
        return f"no replica could go on with it within {policy.resume_timeout_seconds:g} s"
    return ""


def _lost(error: StokerError, hops: Hops, why: str, *, whole: bool) -> StreamLost:
    what_now = (
        "nothing of it was sent, send the request again"
        if whole
        else "what was sent is right as far as it goes, send the request again for all of it"
    )
    return StreamLost(
        f"the answer was cut off after {hops.tokens} tokens: {why} (the last: {error.message}); {what_now}",
        retry_after_seconds=error.retry_after_seconds or LONGEST_PAUSE_SECONDS,
        details={"tokens": hops.tokens, "hops": hops.count, "cause": error.code},
    )


def _pause_seconds(hops: Hops, error: StokerError) -> float:
    """Return how long to wait: not at all after a death, longer and longer while everybody refuses."""
    if hops.refusals == 0:
        return 0.0
    longest = LONGEST_PAUSE_SECONDS
    if isinstance(error, LoadFailed | CapacityError) and error.retry_after_seconds is not None:
        longest = min(longest, max(FIRST_PAUSE_SECONDS, error.retry_after_seconds))
    return min(longest, FIRST_PAUSE_SECONDS * 2.0 ** min(hops.refusals - 1, 10))
