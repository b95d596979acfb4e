"""When running streams move though no start asks for it: `rebalance(...) -> Rebalanced`, pure.

Two reasons: a replica is crowded while another has room (`crowding`), which is also how a new or reopened
node gets its share once `starting` has put a replica there; or a node is too patchy for a model that is
wanted (`clearing`). What keeps either from doing harm:

- both ask for a gain of `hysteresis_ratio` times the cost, and for a reason that has lasted;
- at most `sessions_per_node` sessions are on their way from or to a node, one node is cleared at a time, and
  one look orders `MAX_SHIFTS` shifts at most;
- what has taken sessions gives none, and what has given takes none, for `rest_seconds`; a replica that
  has moved stays for as long, and so does a model that a node was cleared for, or looked at in vain, rest.

Called by the controller now and then (`rebalancer`) and by the simulator (`levelling`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from services.controller.cluster_view.view import Policy, View
from services.controller.scaling.clearing import Clearing, Terms, clear_a_node
from services.controller.scaling.crowding import Bounds, Shift, crowded, shifts
from stoker.ids import ModelName, NodeId, ReplicaId

MAX_SHIFTS = 16
"""Ordered in one look."""
PATCHES_SECONDS = 5.0
"""From one look for patchy nodes to the next: it goes through all models."""
SETTLE_SECONDS = 5.0
"""Added to what a move is expected to take, before its replicas are looked at again: reports come late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceLimits:
    """What rebalancing may do.

    Attributes:
        crowded_seconds: A replica must have had too many sessions for at least this.
        hysteresis_ratio: What is gained must be this many times what it costs.
        sessions_per_node: Sessions on their way from or to one node at a time; 0 = none are moved.
        rest_seconds: See above.
        horizon_seconds: How far ahead a cold model's next request is looked for.
        least_likelihood: Of that request; below it no node is cleared.
        most_moves: Replicas moved to clear one node; 0 = no node is cleared.
    """

    crowded_seconds: float = 2.0
    hysteresis_ratio: float = 2.0
    sessions_per_node: int = 4
    rest_seconds: float = 60.0
    horizon_seconds: float = 300.0
    least_likelihood: float = 0.3
    most_moves: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderWay:
    """A shift that was ordered, and until when its replicas are left alone."""

    shift: Shift
    until_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalanced:
    """What is to be done as of one look, and what the next one must know.

    Attributes:
        shifts: Sessions to move now.
        clearing: A node to clear now.
        crowded_since: Of every crowded replica: since when this has been seen without a break.
        under_way: Shifts that were ordered.
        took: Until when replicas give no sessions, having taken some.
        gave: Until when replicas take no sessions, having given some.
        rests: Until when no node is cleared for a model.
        clears_until_seconds: Until when no node is cleared, nor looked for.
    """

    shifts: tuple[Shift, ...] = ()
    clearing: Clearing | None = None
    crowded_since: Mapping[ReplicaId, float] = field(default_factory=dict)
    under_way: tuple[UnderWay, ...] = ()
    took: Mapping[ReplicaId, float] = field(default_factory=dict)
    gave: Mapping[ReplicaId, float] = field(default_factory=dict)
    rests: Mapping[ModelName, float] = field(default_factory=dict)
    clears_until_seconds: float = 0.0


def rebalance(
    view: View, before: Rebalanced, now_seconds: float, policy: Policy, limits: RebalanceLimits
) -> Rebalanced:
    """Decide what to move now.

    Args:
        view: The cluster.
        before: The last look's result; its orders have been given, or taken back with `has_failed`.
        now_seconds: The view's clock.
        policy: Constants of placement.
        limits: What is allowed.
    """
    return _with_clearing(
        view, _with_shifts(view, before, now_seconds, policy, limits), now_seconds, policy, limits
    )


def has_failed(before: Rebalanced, shift: Shift, now_seconds: float, limits: RebalanceLimits) -> Rebalanced:
    """Return what the next look must know once a shift could not be ordered: its source rests."""
    rests_until = now_seconds + limits.rest_seconds
    return replace(
        before,
        under_way=tuple(each for each in before.under_way if each.shift != shift),
        took={**before.took, shift.replica_id: rests_until},
    )


def _with_shifts(
    view: View, before: Rebalanced, now_seconds: float, policy: Policy, limits: RebalanceLimits
) -> Rebalanced:
    under_way = tuple(each for each in before.under_way if each.until_seconds > now_seconds)
    busy = frozenset(
        replica_id for each in under_way for replica_id in (each.shift.replica_id, each.shift.to_replica_id)
    )
    crowds = crowded(view)
    since = {
        crowd.replica.replica_id: before.crowded_since.get(crowd.replica.replica_id, now_seconds)
        for crowd in crowds
        if crowd.replica.replica_id not in busy  # it has to show once more that it is
    }
    took, gave = _live(before.took, now_seconds), _live(before.gave, now_seconds)
    bounds = Bounds(
        crowded_seconds=limits.crowded_seconds,
        hysteresis_ratio=limits.hysteresis_ratio,
        sessions_per_node=limits.sessions_per_node,
        busy=busy,
        give_not=frozenset(took),
        take_not=frozenset(gave),
        on_their_way=_on_their_way(under_way),
        most=MAX_SHIFTS,
    )
    found = shifts(view, crowds, since, now_seconds, policy, bounds) if since else ()
    begun = tuple(
        UnderWay(shift=shift, until_seconds=now_seconds + 2 * shift.cost_seconds + SETTLE_SECONDS)
        for shift in found
    )
    rests_until = now_seconds + limits.rest_seconds
    return replace(
        before,
        shifts=found,
        crowded_since=since,
        under_way=under_way + begun,
        took={**took, **{shift.to_replica_id: rests_until for shift in found}},
        gave={**gave, **{shift.replica_id: rests_until for shift in found}},
    )


def _with_clearing(
    view: View, before: Rebalanced, now_seconds: float, policy: Policy, limits: RebalanceLimits
) -> Rebalanced:
    rests = {name: until for name, until in before.rests.items() if until > now_seconds}
    if limits.most_moves < 1 or before.clears_until_seconds > now_seconds:
        return replace(before, clearing=None, rests=rests)
    terms = Terms(
        hysteresis_ratio=limits.hysteresis_ratio,
        rest_seconds=limits.rest_seconds,
        horizon_seconds=limits.horizon_seconds,
        least_likelihood=limits.least_likelihood,
        most_moves=limits.most_moves,
    )
    found, looked = clear_a_node(view, rests.keys(), now_seconds, policy, terms)
    rests |= dict.fromkeys(looked, now_seconds + limits.rest_seconds / 4)
    if found is None:
        until_seconds = now_seconds + PATCHES_SECONDS
        return replace(before, clearing=None, rests=rests, clears_until_seconds=until_seconds)
    rests[found.model] = now_seconds + limits.rest_seconds
    until_seconds = now_seconds + found.seconds + SETTLE_SECONDS
    return replace(before, clearing=found, rests=rests, clears_until_seconds=until_seconds)


def _on_their_way(under_way: tuple[UnderWay, ...]) -> Mapping[NodeId, int]:
    counts: dict[NodeId, int] = {}
    for each in under_way:
        for node_id in (each.shift.node_id, each.shift.to_node_id):
            counts[node_id] = counts.get(node_id, 0) + each.shift.sessions
    return counts


def _live(untils: Mapping[ReplicaId, float], now_seconds: float) -> dict[ReplicaId, float]:
    return {replica_id: until for replica_id, until in untils.items() if until > now_seconds}
