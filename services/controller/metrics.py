"""What the controller counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from stoker.metrics import START_STAGE_BUCKETS_SECONDS
from stoker.v1 import start_pb2

PLACEMENTS = Counter("stoker_placements_total", "Placement decisions by outcome.", ["outcome"])
START_STAGE_SECONDS = Histogram(
    "stoker_placed_start_stage_seconds",
    "Stages of replica starts; they overlap.",
    ["stage"],
    buckets=START_STAGE_BUCKETS_SECONDS,
)
PLACEMENT_ERROR_RATIO = Histogram(
    "stoker_placement_error_ratio",
    "|predicted - measured| / measured seconds of a start.",
    buckets=(0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 2, 5),
)
ORDER_SECONDS = Histogram(
    "stoker_placement_seconds",
    "From the decision to the order sent: reservation written.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.5, 1),
)
PREFETCHES = Counter("stoker_prefetches_total", "Prefetches that forecasts ordered, by outcome.", ["outcome"])
PREFETCHED_BYTES = Counter("stoker_prefetched_bytes_total", "What they moved into stores' memory.")
SHIFTS = Counter(
    "stoker_rebalance_shifts_total", "Orders to move sessions of a crowded replica, by outcome.", ["outcome"]
)
SHIFTED_SESSIONS = Counter("stoker_rebalanced_sessions_total", "Sessions asked to move by these.")
CLEARINGS = Counter("stoker_rebalance_clearings_total", "Nodes cleared for a model though nobody asked.")
WAITERS = Gauge("stoker_acquire_waiters", "Requests that wait for a replica.")
LEADING = Gauge("stoker_controller_leading", "1 while this controller leads.")

STAGES = ("placement", "worker", "attach", "weights", "skeleton", "assign", "first_forward", "total")


def observe_start(timings: start_pb2.StartTimings, predicted_seconds: float) -> None:
    """Count a finished start."""
    for stage in STAGES:
        START_STAGE_SECONDS.labels(stage=stage).observe(getattr(timings, f"{stage}_seconds"))
    if timings.total_seconds > 0 and predicted_seconds > 0:
        error_seconds = abs(predicted_seconds - timings.total_seconds)
        PLACEMENT_ERROR_RATIO.observe(error_seconds / timings.total_seconds)
