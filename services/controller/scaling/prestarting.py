"""How many workers each node keeps pre-started, from how often models are asked for. Pure.

As many as starts come while one worker starts, with `confidence` (Poisson), shared by the open nodes; at
least one where replicas may start, none where they may not, at most what the memory budget and the slots
allow. The number rises at once and falls when it was too high for `hold_seconds`. Without any history the
agents do as they are configured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from services.controller.cluster_view.estimate import worker_start_seconds
from services.controller.cluster_view.fleet import Standing, members_of
from services.controller.cluster_view.forecast import expected_rate_per_second
from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.view import View
from stoker.ids import NodeId

LIVE = (Standing.STARTING, Standing.READY)
MAX_WORKERS = 64
"""Of one node, whatever is forecast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Warm workers wanted on a node, and until when at least."""

    count: int
    until_seconds: float


def pools(  # noqa: PLR0913 - what bounds the numbers, each named by its caller
    view: View,
    before: Mapping[NodeId, Pool],
    now_seconds: float,
    *,
    memory_bytes: int,
    bytes_per_worker: int,
    confidence: float,
    hold_seconds: float,
) -> dict[NodeId, Pool]:
    """Return the warm workers wanted, by node; empty = agents do as they are configured.

    Args:
        view: The cluster.
        before: The last look's.
        now_seconds: The view's clock.
        memory_bytes: Per node, for pre-started workers; 0 = none are wanted.
        bytes_per_worker: What one takes.
        confidence: That a start finds one.
        hold_seconds: A number that is too high stays this long.
    """
    if memory_bytes <= 0 or not view.arrivals:
        return {}
    open_nodes = index_of(view).open_nodes
    starts_per_second = sum(
        expected_rate_per_second(arrivals, now_seconds)
        for name, arrivals in view.arrivals.items()
        if name in view.models and not any(found.standing in LIVE for found in members_of(view, name))
    )
    found: dict[NodeId, Pool] = {}
    for node_id, node in view.nodes.items():
        mean = starts_per_second * worker_start_seconds(node) / max(1, len(open_nodes))
        wanted = _workers(mean, confidence) if index_of(view).summaries[node_id].is_open else 0
        wanted = min(wanted, len(node.devices), memory_bytes // bytes_per_worker)
        found[node_id] = _held_up(before.get(node_id), wanted, now_seconds, hold_seconds)
    return found


def _held_up(before: Pool | None, wanted: int, now_seconds: float, hold_seconds: float) -> Pool:
    """Return the wanted number, or the one before while that is higher and its time is not over."""
    if before is None or wanted >= before.count:
        return Pool(count=wanted, until_seconds=now_seconds + hold_seconds)
    if now_seconds < before.until_seconds:
        return before
    return Pool(count=wanted, until_seconds=now_seconds + hold_seconds)


def _workers(mean: float, confidence: float) -> int:
    """Return the least number, at least 1, that a Poisson variable does not exceed, with this confidence."""
    term = share = math.exp(-mean)
    count = 0
    while share < confidence and count < MAX_WORKERS:
        count += 1
        term *= mean / count
        share += term
    return max(1, count)
