"""Nodes with room, but too patchy for a model that is wanted: which replicas move so that it fits. Pure.

A model of several devices, or one that few nodes can take, finds no node while small replicas are spread over
all of them. Requests that wait have them moved by `place`; here it is done before anybody waits:

1. for a model that wants a replica and was refused one though nobody is disturbed for it (a second one of
   `min_replicas`, or one for its load). It has lacked that for so long, and is taken to go on lacking it as
   long again: that is the gain;
2. for a cold model that is likely to be asked for within the horizon. Its start would wait for the moves that
   it needs; the gain is that time, as likely as the start is.

The moves are those that `place` would order, at its cost. They are worth it when the gain is
`hysteresis_ratio` times that (SHEPHERD's rule, NSDI '23). Nothing is stopped, idle or not: where stopping
what is idle would do, the node is not patchy. What has moved to make room is not moved again for
`rest_seconds`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from services.controller.cluster_view.forecast import likelihood
from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.view import Policy, View
from services.controller.placement.options import Move
from services.controller.placement.place import Migrate as Patchy
from services.controller.placement.place import Wait, place
from services.controller.scaling.actions import Migrate
from stoker.ids import ModelName, NodeId

MAX_LOOKED_AT = 2
"""Models placed per look, those that promise most first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clearing:
    """Move these replicas off a node, so that a model fits there.

    Attributes:
        model: Who would fit.
        node_id: Where.
        moves: What goes, and where to.
        wanted: It wants a replica now: the room is for nobody else.
        gain_seconds: Of waiting that it is expected to be spared.
        cost_seconds: What the moves cost others.
    """

    model: ModelName
    node_id: NodeId
    moves: tuple[Move, ...]
    wanted: bool
    gain_seconds: float
    cost_seconds: float

    @property
    def seconds(self) -> float:
        """How long it is expected to take: starts elsewhere first, then their sessions follow."""
        return max(move.estimate.total_seconds + move.seconds for move in self.moves)


def migrations(view: View, clearing: Clearing) -> tuple[Migrate, ...]:
    """Return what is ordered to clear a node."""
    return tuple(
        Migrate(
            replica_id=move.replica_id,
            model=move.model,
            node_id=clearing.node_id,
            to_node_id=move.to_node_id,
            to_devices=move.to_devices,
            runtime=view.models[move.model].runtime,
            estimate=move.estimate,
            move_seconds=move.seconds,
            for_model=clearing.model if clearing.wanted else None,
        )
        for move in clearing.moves
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """When a clearing is worth it.

    Attributes:
        hysteresis_ratio: The gain must be this many times the cost.
        rest_seconds: A replica ready for less than this is not moved.
        horizon_seconds: How far ahead a model's next request is looked for.
        least_likelihood: Of that request.
        most_moves: In one clearing.
    """

    hysteresis_ratio: float
    rest_seconds: float
    horizon_seconds: float
    least_likelihood: float
    most_moves: int


def clear_a_node(
    view: View, resting: Collection[ModelName], now_seconds: float, policy: Policy, terms: Terms
) -> tuple[Clearing | None, tuple[ModelName, ...]]:
    """Return the first clearing that is worth it, and the models that were looked at in vain before it.

    Args:
        view: The cluster.
        resting: Models that are not looked at now.
        now_seconds: The view's clock.
        policy: Constants.
        terms: When it is worth it.
    """
    looked: list[ModelName] = []
    if not policy.may_migrate or not any(len(nodes) for nodes in index_of(view).free.values()):
        return None, ()  # nothing may move, or nothing has anywhere to go
    calm = replace(
        policy,
        minimum_residency_seconds=max(policy.minimum_residency_seconds, terms.rest_seconds),
        residency_ends_served=False,
    )
    for name, worth_seconds in _candidates(view, now_seconds, terms):
        if name in resting:
            continue
        if len(looked) >= MAX_LOOKED_AT:
            break
        found = _clearing(view, name, worth_seconds, now_seconds, calm, terms)
        if found is not None:
            return found, tuple(looked)
        looked.append(name)
    return None, tuple(looked)


def _candidates(view: View, now_seconds: float, terms: Terms) -> Iterator[tuple[ModelName, float | None]]:
    """Yield models that want a replica, and how many seconds they have; then those that will (None)."""
    waiting = sorted(
        (refusal.at_seconds, name)
        for name, refusal in view.refusals.items()
        if name in view.models and name not in view.demands and not refusal.disturbs and not refusal.code
    )
    for at_seconds, name in waiting:
        yield name, now_seconds - at_seconds
    tallies = index_of(view).tallies
    expected = sorted(
        (-chance * view.models[name].file_bytes, name)
        for name, arrivals in view.arrivals.items()
        if name in view.models
        and name not in tallies
        and name not in view.demands
        and name not in view.refusals
        and _needs_a_place_of_its_own(view, name)
        and (chance := likelihood(arrivals, now_seconds, terms.horizon_seconds)) >= terms.least_likelihood
    )
    for _, name in expected:
        yield name, None


def _needs_a_place_of_its_own(view: View, name: ModelName) -> bool:
    """Tell whether not every free slot would do for a model: only then free slots can be the wrong ones."""
    model = view.models[name]
    return model.devices > 1 or bool(model.required_labels) or len(index_of(view).shapes) > 1


def _clearing(  # noqa: PLR0913, PLR0917 - what a decision is made of
    view: View,
    name: ModelName,
    waited_seconds: float | None,
    now_seconds: float,
    policy: Policy,
    terms: Terms,
) -> Clearing | None:
    if not isinstance(place(view, name, now_seconds, policy, may_disturb=False), Wait):
        return None
    decision = place(view, name, now_seconds, policy)
    if not isinstance(decision, Patchy) or decision.victims or len(decision.moves) > terms.most_moves:
        return None
    cost_seconds = sum(move.seconds for move in decision.moves)
    if waited_seconds is not None:
        gain_seconds = waited_seconds
    else:
        chance = likelihood(view.arrivals[name], now_seconds, terms.horizon_seconds)
        gain_seconds = chance * decision.estimate.stop_seconds
    if gain_seconds < terms.hysteresis_ratio * cost_seconds:
        return None
    return Clearing(
        model=name,
        node_id=decision.node_id,
        moves=decision.moves,
        wanted=waited_seconds is not None,
        gain_seconds=gain_seconds,
        cost_seconds=cost_seconds,
    )
