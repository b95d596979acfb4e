"""What the sorted lists of the index say about all nodes together: the fastest rate, the least time. Pure."""

from __future__ import annotations

from math import inf

from services.controller.cluster_view.index import Index
from services.controller.cluster_view.places import Nodes
from services.controller.cluster_view.summary import ORIGINS
from services.controller.placement.room import Wanted

ROUNDING = 1 - 1e-9
"""Sums of the same terms in another order may differ by a rounding; a bound must not be above its node."""


def lowest(nodes: Nodes | None) -> float:
    """Return the lowest number in a list of nodes; 0 where there is none."""
    return nodes.runs[0][0][0] if nodes is not None and nodes.runs else 0.0


def copy_seconds(index: Index, byte_count: float) -> float:
    """Return what it takes at least to copy so many bytes to a device, on any node."""
    runs = index.by_device.runs
    return byte_count / runs[-1][-1][0] * ROUNDING if runs else 0.0


def swiftest_source(index: Index) -> tuple[float, float] | None:
    """Return a rate and a worker's time that no node with free slots betters together; None = there is none.

    The rate is the fastest from any of `ORIGINS`: whoever has none of a checkpoint in memory reads no faster.
    """
    rate, worker_seconds = 0.0, inf
    for shape in index.shapes:
        for waits in (True, False):
            for origin in ORIGINS:
                nodes = index.free.get((origin, 1, waits, shape))
                if nodes is not None:
                    rate = max(rate, -nodes.first[0])
            if waits and nodes is not None:
                worker_seconds = 0.0
            elif nodes is not None:
                worker_seconds = min(worker_seconds, index.free_by_worker["", 1, waits, shape].first[0])
    return (rate, worker_seconds) if rate else None


def rungs_of(index: Index, wanted: Wanted) -> list[tuple[Nodes, Nodes | None]]:
    """Return where free nodes are listed that could take the model: by the rate of its load, by the worker.

    Where a worker waits on all of them there is no second list.
    """
    free, rungs = 1 << (wanted.slots.bit_length() - 1), index.free
    found: list[tuple[Nodes, Nodes | None]] = []
    for shape in index.shapes:
        if wanted.slots_that_fit(shape):
            nodes = rungs.get((wanted.origin, free, True, shape))
            if nodes is not None:
                found.append((nodes, None))
            nodes = rungs.get((wanted.origin, free, False, shape))
            if nodes is not None:
                found.append((nodes, index.free_by_worker[("", free, False, shape)]))
    return found
