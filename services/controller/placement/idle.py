"""Nodes where an idle replica makes room, best first; most of those that are read are not looked at. Pure.

They are read in two lists, by rate and by worth, as in `streams`. How far that goes is about the square root
of the lists' length, and most of what is read costs more than the best node so far by its rate or its worth
alone. Such nodes are put aside, and count only if the best one does not hold what its bound promised.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from math import inf
from sys import maxsize
from typing import Final

from services.controller.placement.bounds import NOBODY, NOBODY_IS_DEAR, Bounded, Bounds
from services.controller.placement.cursor import Cursor, Runs, next_reached
from services.controller.placement.options import Rank
from services.controller.placement.rates import ROUNDING
from stoker.ids import NodeId

MOST_ROWS, MOST_ROWS_ALONE = 8, 32
"""Rows of a list read between two looks at what those that follow cost at least; more where most are dear."""
_END: Final[Rank] = (maxsize, 0, 0.0, 0, inf, "")
"""The rank of what comes after everything."""
_SECONDS: Final = 4
"""Where a rank has its seconds."""


def idle_nodes(
    by_rate: Runs, by_worth: Runs, known: AbstractSet[NodeId], bounds: Bounds, *, alone: bool
) -> Iterator[Bounded]:
    """Yield nodes with idle replicas by their bounds, the lowest first, and in between how far it has come.

    Args:
        by_rate: Nodes by negative rate.
        by_worth: The same nodes by the worth of the idle replica that is cheapest to lose.
        known: Nodes to leave out, for another stream has them.
        bounds: What they cost at least.
        alone: No node has free slots, so that nobody asks for a runner-up among these: what was put aside is
            out as soon as something better is found.
    """
    seen = set(known)
    ready: list[Bounded] = []
    aside: list[NodeId] = []
    aside_seconds, aside_rank = inf, _END  # those put aside cost more, and don't beat this rank
    beyond = bounds.idle_beyond
    rates, worths = Cursor(by_rate), Cursor(by_worth)
    count, most_rows = (4, MOST_ROWS_ALONE) if alone else (1, MOST_ROWS)
    reached = beyond(-rates.reached, worths.reached)
    while True:
        certain = min(reached, aside_rank)
        while ready and ready[0][0] <= certain:
            yield heapq.heappop(ready)
        if aside and aside_rank <= reached:
            yield aside_rank, NOBODY
            ready += bounds.idle_on([(0.0, node_id) for node_id in aside], set(), NOBODY_IS_DEAR, [], inf)
            heapq.heapify(ready)
            aside, aside_seconds, aside_rank = [], inf, _END
            continue
        if reached is _END:
            return
        yield reached, NOBODY
        limit_seconds = most_seconds = bounds.limit_seconds
        if ready and limit_seconds == inf:
            most_seconds = ready[0][0][_SECONDS] / ROUNDING**2 + bounds.tie_seconds
        dear = bounds.dear_idle(-rates.reached, worths.reached, most_seconds)
        faster, reached = next_reached(rates, worths, count, beyond)
        rows = faster.read(count)
        if not rows:
            reached = _END
            continue
        out = aside if limit_seconds == inf else []
        for bounded in bounds.idle_on(rows, seen, dear, out, limit_seconds):
            heapq.heappush(ready, bounded)
        if aside and most_seconds < aside_seconds:
            aside_seconds = most_seconds
            aside_rank = (int(most_seconds / bounds.tie_seconds), int(alone), 0.0, 0, 0.0, "")
        count = min(2 * count, most_rows)
