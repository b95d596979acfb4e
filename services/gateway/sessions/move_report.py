"""A move that has been made: counted, and told in one canonical log line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.gateway import metrics
from services.gateway.routing.routes import Replica
from services.gateway.sessions.move_gaps import Phase
from services.gateway.sessions.mover import Moved
from services.gateway.sessions.session import Session
from services.gateway.trace import Trace
from stoker import log


@dataclass(frozen=True, slots=True, kw_only=True)
class Switched:
    """A move that has been made, until its destination's first new token."""

    moved: Moved
    source: Replica
    tokens: int
    last_token_seconds: float
    seconds: float


def report_moved(
    switched: Switched, session: Session, trace: Trace, token_seconds: float, numerics: Mapping[str, str]
) -> None:
    """Count a move whose destination has made its first new token, and write its canonical line.

    Args:
        switched: The move.
        session: The session.
        trace: Of its request.
        token_seconds: When that token came.
        numerics: Of both replicas, where they differ.
    """
    moved = switched.moved
    pause_seconds = token_seconds - switched.last_token_seconds
    moved.gaps.note(Phase.SWITCH, pause_seconds)
    gaps, (worst_phase, worst_seconds) = moved.gaps.longest_seconds, moved.gaps.worst
    trace.moves += 1
    metrics.MOVES.labels(trace.model, "moved").inc()
    metrics.MOVE_PAUSE_SECONDS.labels(trace.model).observe(pause_seconds)
    metrics.MOVE_GAP_SECONDS.labels(trace.model, worst_phase.value).observe(worst_seconds)
    metrics.MOVE_SECONDS.labels(trace.model).observe(switched.seconds)
    metrics.MOVE_TOKENS.labels(trace.model).inc(moved.recomputed_tokens)
    metrics.MOVE_BYTES.labels(trace.model).inc(moved.shipped.data_bytes)
    path = "ship" if moved.shipped.tokens else "replay"
    metrics.MOVE_PATHS.labels(trace.model, path, moved.shipped.why_not).inc()
    log.get().info(
        "session.moved",
        migration_id=moved.migration_id,
        request_id=trace.request_id,
        session_id=session.session_id,
        model=trace.model,
        from_replica_id=switched.source.replica_id,
        from_node_id=switched.source.node_id,
        to_replica_id=moved.replica.replica_id,
        to_node_id=moved.replica.node_id,
        epoch=moved.epoch,
        reason=moved.reason,
        path=path,
        why_not_shipped=moved.shipped.why_not,
        tokens=len(session.prompt_token_ids) + switched.tokens,
        recomputed_tokens=moved.recomputed_tokens,
        rounds=moved.rounds,
        lag_tokens=max(0, switched.tokens - moved.first.position),
        ship_rounds=moved.shipped.rounds,
        shipped_tokens=moved.shipped.tokens,
        shipped_bytes=moved.shipped.data_bytes,
        seconds=round(switched.seconds, 6),
        pause_seconds=round(pause_seconds, 6),
        longest_gap_seconds=round(worst_seconds, 6),
        longest_gap_phase=worst_phase.value,
        longest_gaps_seconds={phase.value: round(seconds, 6) for phase, seconds in gaps.items()},
        **numerics,
    )
