"""What starts, moves and arrivals were measured to be, and what was learnt from them: values of the view.

Times are seconds of the controller's monotonic clock, as everywhere in the `view`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stoker.ids import ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred:
    """What one tier moved during a start."""

    tier: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StartStages:
    """Measured seconds of a finished start; see `StartTimings` in the protos."""

    worker_seconds: float = 0.0
    weights_seconds: float = 0.0
    skeleton_seconds: float = 0.0
    first_forward_seconds: float = 0.0
    total_seconds: float = 0.0
    transfers: tuple[Transferred, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A session that moved, as its source measured it; `path` is `ship` or `replay`."""

    migration_id: str
    model: ModelName
    path: str
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """A robust running estimate of a rate; see `bandwidth`.

    Attributes:
        log_rate: Natural logarithm of bytes per second.
        log_spread: Typical distance of a sample from it, in the logarithm.
        weight: Samples behind it, older ones counting less.
        at_seconds: When it was last changed.
    """

    log_rate: float
    log_spread: float
    weight: float
    at_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What the starts on all nodes together have taught; see `lessons`.

    Attributes:
        rates: By stage.
        starts: Of the last ones: skeleton over its seed, first forward in seconds, overhead in seconds.
        openings: Of the last starts from each far tier, seconds that they took beyond the typical overhead.
        typical: Their medians; None = there was none yet.
    """

    rates: Mapping[str, Learnt] = field(default_factory=dict)
    starts: tuple[tuple[float, float, float], ...] = ()
    typical: tuple[float, float, float] | None = None
    openings: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCost:
    """Seconds to move a session: `a_seconds_per_token` * tokens + `b_seconds`; from `samples` moves.

    The sums are those of a least-squares line, older moves counting less.
    """

    a_seconds_per_token: float
    b_seconds: float
    samples: int = 0
    weight: float = 0.0
    sum_tokens: float = 0.0
    sum_seconds: float = 0.0
    sum_tokens_squared: float = 0.0
    sum_tokens_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """When a model was asked for: gaps between requests, counted by minute; see `forecast`.

    Attributes:
        last_seconds: The last request.
        gap_counts: Idle times that ended with a request, by whole minutes; at most four hours of them.
        longer: Idle times beyond.
        rate_per_second: Requests per second, a running estimate.
        missed: The model was not asked for in the window its history promised, since the last request.
    """

    last_seconds: float
    gap_counts: tuple[tuple[int, int], ...] = ()
    longer: int = 0
    rate_per_second: float = 0.0
    missed: bool = False
