"""When a model is wanted again, from when it was wanted before: the hybrid histogram. Pure.

*Serverless in the Wild* (ATC '20), section 4: idle times are counted by the minute; a model is unloaded at
once, started again just before the head of the distribution, and kept until just after its tail. Where the
histogram says little (few samples, most idle times beyond it, all minutes alike) the set keep-alive stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.controller.cluster_view.frozen import amender_of
from services.controller.cluster_view.learnt import Arrivals
from services.controller.cluster_view.view import Model

BIN_SECONDS = 60.0
BINS = 240
HEAD, TAIL = 0.05, 0.99
MARGIN = 0.10
"""The window is widened by this share on both sides, as in the paper."""
LEAST_SAMPLES = 8
LEAST_INSIDE = 0.5
LEAST_VARIATION = 2.0
"""Of the bins' counts: below it the histogram is flat, and says nothing (the paper's threshold)."""
RATE_SAMPLES = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """When an idle model is expected back, in seconds since it fell idle.

    Attributes:
        prewarm_seconds: Not before this; 0 = at any moment, so it stays.
        keep_seconds: Hardly after this; it is stopped then.
    """

    prewarm_seconds: float
    keep_seconds: float


def arrived(before: Arrivals | None, now_seconds: float) -> Arrivals:
    """Return the history after one more request."""
    if before is None:
        return Arrivals(last_seconds=now_seconds)
    gap_seconds = max(0.0, now_seconds - before.last_seconds)
    rate = 1.0 / max(gap_seconds, 0.001)
    rate_per_second = 1.0 / (
        (1.0 / before.rate_per_second if before.rate_per_second else gap_seconds or 0.001)
        * (1 - 1 / RATE_SAMPLES)
        + (1.0 / rate) / RATE_SAMPLES
    )
    minute, counts, longer = int(gap_seconds // BIN_SECONDS), before.gap_counts, before.longer
    if minute >= BINS:
        longer += 1
    elif counts and counts[0][0] == minute:  # as most are
        counts = ((minute, counts[0][1] + 1), *counts[1:])
    else:
        known = dict(counts)
        known[minute] = known.get(minute, 0) + 1
        counts = tuple(sorted(known.items()))
    return _after(before, now_seconds, rate_per_second, counts, longer, False)


_after = amender_of(Arrivals, "last_seconds", "rate_per_second", "gap_counts", "longer", "missed")


def window(arrivals: Arrivals | None) -> Window | None:
    """Return when the model is expected back; None where its history says too little."""
    inside = sum(count for _, count in arrivals.gap_counts) if arrivals else 0
    if arrivals is None or inside < LEAST_SAMPLES or inside < LEAST_INSIDE * (inside + arrivals.longer):
        return None
    mean = inside / BINS
    variance = sum((count - mean) ** 2 for _, count in arrivals.gap_counts)
    variance = (variance + (BINS - len(arrivals.gap_counts)) * mean**2) / BINS
    if variance**0.5 / mean < LEAST_VARIATION:
        return None
    head, tail = _percentile_bin(arrivals, inside, HEAD), _percentile_bin(arrivals, inside, TAIL) + 1
    return Window(
        prewarm_seconds=head * BIN_SECONDS * (1 - MARGIN), keep_seconds=tail * BIN_SECONDS * (1 + MARGIN)
    )


def expected_rate_per_second(arrivals: Arrivals, now_seconds: float) -> float:
    """Return how often the model is asked for now: from its mean gap, or its silence where that is longer."""
    idle_seconds = max(0.0, now_seconds - arrivals.last_seconds)
    if arrivals.rate_per_second <= 0:
        return 0.0  # asked for once: nothing says that it will be again
    return 1.0 / max(1.0 / arrivals.rate_per_second, idle_seconds)


def likelihood(arrivals: Arrivals, now_seconds: float, horizon_seconds: float) -> float:
    """Return how likely the model is asked for within the horizon, given how long it has been idle.

    From its own gaps: of those that were longer than its silence so far, the share that ended within the
    horizon. Where the history is short, or the silence longer than all of it, a Poisson process at
    `expected_rate_per_second` stands in.
    """
    idle_seconds = max(0.0, now_seconds - arrivals.last_seconds)
    first = int(idle_seconds // BIN_SECONDS)
    last = int((idle_seconds + horizon_seconds) // BIN_SECONDS)
    longer = sum(count for minute, count in arrivals.gap_counts if minute >= first) + arrivals.longer
    if sum(count for _, count in arrivals.gap_counts) + arrivals.longer >= LEAST_SAMPLES and longer > 0:
        return sum(count for minute, count in arrivals.gap_counts if first <= minute <= last) / longer
    return 1.0 - math.exp(-expected_rate_per_second(arrivals, now_seconds) * horizon_seconds)


def keep_alive_seconds(model: Model, arrivals: Arrivals | None) -> float:
    """Return how long an unused replica of `model` lives now; negative = for ever.

    With `keep_alive_auto` and a telling history: until its window ends, or not at all where the window begins
    so late that starting it again in time is cheaper than keeping it.
    """
    found = window(arrivals) if model.keep_alive_auto else None
    if found is None:
        return model.keep_alive_seconds
    wanted = 0.0 if found.prewarm_seconds > 0 else found.keep_seconds
    return wanted if model.keep_alive_seconds < 0 else min(wanted, model.keep_alive_seconds)


def keep_until_seconds(model: Model, arrivals: Arrivals | None, idle_since_seconds: float) -> float | None:
    """Return until when a replica idle since then is kept, on the view's clock; None = for ever.

    One that a forecast has started is kept until the forecast's window ends.
    """
    expected = prewarm_window_seconds(model, arrivals)
    if expected is not None and idle_since_seconds >= expected[0]:
        return expected[1]
    seconds = keep_alive_seconds(model, arrivals)
    return None if seconds < 0 else idle_since_seconds + seconds


def prewarm_window_seconds(model: Model, arrivals: Arrivals | None) -> tuple[float, float] | None:
    """Return from when until when (on the view's clock) the model is to be ready though nobody asks."""
    found = window(arrivals) if model.keep_alive_auto else None
    if found is None or arrivals is None or arrivals.missed or found.prewarm_seconds <= 0:
        return None
    begins_seconds = arrivals.last_seconds + found.prewarm_seconds
    return begins_seconds, arrivals.last_seconds + found.keep_seconds


def _percentile_bin(arrivals: Arrivals, inside: int, share: float) -> int:
    left = share * inside
    for minute, count in arrivals.gap_counts:
        left -= count
        if left <= 0:
            return minute
    return arrivals.gap_counts[-1][0]
