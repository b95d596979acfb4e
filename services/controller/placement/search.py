"""The best node for a model without looking at all of them: best first, exact. Pure.

Nodes come from `streams` in ascending order of what they cost at least; the search takes the lowest of all
until it is above the best found (A* without a goal). So a stream is read only as far as its next node could
still win.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.controller.cluster_view.frozen import maker_of
from services.controller.placement.bounds import NOBODY, Bounded, Bounds
from services.controller.placement.cheapest import best_on
from services.controller.placement.destinations import Destinations
from services.controller.placement.options import Option, Rank, rank
from services.controller.placement.room import Situation
from services.controller.placement.streams import streams
from stoker.ids import NodeId

SHOWN = 2
"""Options that are looked for at least, so that an explanation can name a runner-up; one that disturbs others
is worked out only if it could win."""
LOOKED = 8
"""Nodes looked at for the sake of a runner-up, at most."""
LOWEST: Rank = (-1, 0, 0.0, 0, 0.0, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best option, if any, and all that were looked at, the best first."""

    best: Option | None
    options: tuple[Option, ...]


_make_found = maker_of(Found)


def search(situation: Situation, *, exhaustive: bool = False) -> Found:
    """Return the best way to start the situation's model; `exhaustive` looks at every open node."""
    ranked: list[tuple[Rank, Option]] = []
    best_rank: Rank | None = None
    looked: set[NodeId] = set()
    destinations = Destinations(situation)
    bounds = Bounds(situation, situation.wanted, may_disturb=situation.may_disturb)
    nodes = _every_node(situation) if exhaustive else streams(situation, bounds)
    for bound, node_id in nodes:
        if (
            best_rank is not None
            and bound > best_rank
            and (bound[1] or len(ranked) >= SHOWN or len(looked) >= LOOKED)
        ):
            break
        if node_id == NOBODY or node_id in looked:
            continue
        if bounds.is_behind(bound, node_id):
            continue  # of a thousand equal nodes only the first ones are worked out
        looked.add(node_id)
        option = best_on(
            situation, situation.view.nodes[node_id], destinations, None if exhaustive else best_rank
        )
        if option is not None:
            found = rank(option, situation.policy)
            ranked.append((found, option))
            if best_rank is None or found < best_rank:
                best_rank = found
                bounds.limit_seconds = (found[0] + 1) * situation.policy.tie_seconds
            if len(ranked) >= SHOWN:
                bounds.best = best_rank
    ranked.sort(key=_rank_of)
    options = tuple([option for _, option in ranked])
    return _make_found(best=options[0] if options else None, options=options)


def _rank_of(ranked: tuple[Rank, Option]) -> Rank:
    return ranked[0]


def _every_node(situation: Situation) -> Iterator[Bounded]:
    return ((LOWEST, node_id) for node_id in situation.index.open_nodes)
