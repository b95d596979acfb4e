"""Rates learnt online, one per node and stage: robust against stalls and lucky caches. Pure.

Rates are compared by their ratio, so the estimate runs on logarithms: an exponentially weighted mean whose
samples lose half their weight in `HALF_LIFE_SECONDS`, and into which no sample enters further away than
`CLIP_SPREADS` typical distances (Huber's clipping: an outlier moves the estimate, but only so far).
"""

from __future__ import annotations

import math
from dataclasses import replace

from services.controller.cluster_view.learnt import Learnt, Transferred

HALF_LIFE_SECONDS = 1800.0
CLIP_SPREADS = 2.0
FIRST_SPREAD = 0.25
"""Until it is measured: samples within 28 % of each other are usual on an idle disk."""
LEAST_SPREAD = 0.05
MOST_WEIGHT = 20.0
LEAST_BYTES = 1_000_000
"""A transfer of less says more about its latency than about its rate."""


def rate_of(learnt: Learnt) -> float:
    """Return the estimate, in bytes per second."""
    return math.exp(learnt.log_rate)


def as_said(bytes_per_second: float, now_seconds: float) -> Learnt | None:
    """Return what somebody says a rate is, with weight 0: a measurement replaces it. None = nothing."""
    return replace(_first(bytes_per_second, now_seconds), weight=0.0) if bytes_per_second > 0 else None


def learn(
    before: Learnt | None, transferred: Transferred, now_seconds: float, *, seed: float
) -> Learnt | None:
    """Return the estimate after one more measured transfer; None = still nothing is known.

    Args:
        before: The estimate so far; None = only `seed` is known.
        transferred: What was measured while nothing else used the stage.
        now_seconds: The view's clock.
        seed: The store's own figure, in bytes per second; counts as one sample. 0 = it has none.
    """
    if transferred.bytes < LEAST_BYTES or transferred.seconds <= 0:
        return before or (_first(seed, now_seconds) if seed > 0 else None)
    sample = math.log(transferred.bytes / transferred.seconds)
    if before is None:
        if seed <= 0:
            return Learnt(log_rate=sample, log_spread=FIRST_SPREAD, weight=1.0, at_seconds=now_seconds)
        before = _first(seed, now_seconds)
    aged = before.weight * 0.5 ** (max(0.0, now_seconds - before.at_seconds) / HALF_LIFE_SECONDS)
    weight = min(MOST_WEIGHT, aged + 1.0)
    reach = CLIP_SPREADS * before.log_spread * (1.0 + 1.0 / weight)
    distance = min(reach, max(-reach, sample - before.log_rate))
    step = 1.0 / weight
    return Learnt(
        log_rate=before.log_rate + step * distance,
        log_spread=max(LEAST_SPREAD, before.log_spread + step * (abs(distance) * 1.25 - before.log_spread)),
        weight=weight,
        at_seconds=now_seconds,
    )


def _first(bytes_per_second: float, now_seconds: float) -> Learnt:
    return Learnt(
        log_rate=math.log(max(1.0, bytes_per_second)),
        log_spread=FIRST_SPREAD,
        weight=1.0,
        at_seconds=now_seconds,
    )
