"""Models that want a replica at the same time get the plan that a look at every order finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.cluster_view.events import Demanded, StopOrdered
from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.view import Policy, Stage, View
from services.controller.placement import together
from services.controller.placement.outcome import outcome
from services.controller.placement.place import Migrate, Placed, StopIdle, Wait, place
from services.controller.placement.together import Ask, order_together
from stoker.ids import ModelName, NodeId, ReplicaId
from stoker.units import GB
from tests.unit.services.controller.builders import (
    NOW_SECONDS,
    a_model,
    a_node,
    a_replica,
    a_reservation,
    a_view,
)
from tests.unit.services.controller.placement.test_search import MODELS, MOVING, POLICY, views

Score = tuple[tuple[bool, ...], float]


def score(view: View, order: Sequence[Ask], asks: Sequence[Ask]) -> Score:
    """Return who gets no room when they choose in this order, and what the others' starts cost."""
    cost_seconds, roomless, ids = 0.0, set[ModelName](), count()
    for ask in order:
        decision = place(
            view, ask.name, NOW_SECONDS, ask.policy, may_disturb=ask.may_disturb, exhaustive=True
        )
        if isinstance(decision, Placed | StopIdle | Migrate):
            cost_seconds += decision.options[0].cost_seconds
        else:
            roomless.add(ask.name)
        for event in outcome(
            view, ask.name, decision, NOW_SECONDS, new_id=lambda: ReplicaId(f"new-{next(ids)}")
        ):
            view = fold(view, event)
    return tuple(ask.name in roomless for ask in asks), cost_seconds


def asking(view: View, names: Sequence[str], policy: Policy) -> tuple[View, tuple[Ask, ...]]:
    """Return the view with requests for these, longest waiting first, and what may be done for them."""
    for age, name in enumerate(names):
        view = fold(view, Demanded(model=ModelName(name), now_seconds=NOW_SECONDS - 10 + age))
    return view, tuple(Ask(name=ModelName(name), policy=policy, may_disturb=True) for name in names)


@settings(max_examples=25, deadline=None)
@given(views(), st.permutations(MODELS), st.sampled_from((POLICY, MOVING)))
def test_no_order_of_three_is_better_than_the_one_that_is_found(
    view: View, names: list[str], policy: Policy
) -> None:
    view, asks = asking(view, names[:3], policy)

    found = score(view, order_together(view, asks, NOW_SECONDS), asks)
    best = min(score(view, order, asks) for order in permutations(asks))

    assert found[0] == best[0]
    assert found[1] <= best[1] + 2 * len(asks) * policy.tie_seconds


def two_nodes_with_an_idle_replica_each(*, near_gb: float = 4.0, far_gb: float = 1.0) -> View:
    """Both are full; on `near` loads are faster."""
    small, large = a_model("small", file_bytes=GB), a_model("large", file_bytes=30 * GB)
    nodes = tuple(
        a_node(
            node_id,
            replicas=(a_replica(f"idle-{node_id}", "v", idle_since_seconds=NOW_SECONDS - 90),),
            stages={"disk": Stage(bytes_per_second=rate * GB)},
        )
        for node_id, rate in (("near", near_gb), ("far", far_gb))
    )
    reservations = tuple(a_reservation(f"idle-{node_id}", "v", node_id) for node_id in ("near", "far"))
    return a_view(models=(small, large, a_model("v", max_replicas=2)), nodes=nodes, reservations=reservations)


def test_who_would_lose_more_gets_the_node_whose_idle_replica_both_would_stop() -> None:
    view, asks = asking(two_nodes_with_an_idle_replica_each(), ("small", "large"), POLICY)

    order = order_together(view, asks, NOW_SECONDS)

    assert [ask.name for ask in order] == ["large", "small"]


def test_who_waits_longest_goes_first_where_only_one_finds_room() -> None:
    view = two_nodes_with_an_idle_replica_each()
    view = replace(view, nodes={NodeId("near"): view.nodes[NodeId("near")]})
    view, asks = asking(view, ("small", "large"), POLICY)

    assert order_together(view, asks, NOW_SECONDS) == asks


def test_in_a_tie_who_waits_longest_goes_first() -> None:
    view, asks = asking(two_nodes_with_an_idle_replica_each(near_gb=1.0), ("small", "large"), POLICY)

    assert order_together(view, asks, NOW_SECONDS) == asks


def test_looking_for_an_order_ends_after_so_many_placements(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = count()

    def counted(*args: object, **options: object) -> object:
        next(looked)
        return place(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(together, "place", counted)
    names = [f"m{number}" for number in range(8)]
    view = a_view(models=tuple(a_model(name) for name in names), nodes=(a_node(devices=8), a_node("b")))
    view, asks = asking(view, names, POLICY)

    order = order_together(view, asks, NOW_SECONDS)

    assert sorted(ask.name for ask in order) == sorted(names)
    assert next(looked) <= together.MAX_PLACEMENTS


def test_a_slot_promised_to_who_has_another_one_emptied_is_not_given_away() -> None:
    """`wide` needs both slots: one is free, from the other an idle replica is being stopped for it."""
    wide, narrow = a_model("wide", devices=2), a_model("narrow")
    node = a_node(devices=2, replicas=(a_replica("idle", "v"),))
    view = a_view(
        models=(wide, narrow, a_model("v")), nodes=(node,), reservations=(a_reservation("idle", "v"),)
    )
    stopping = StopOrdered(replica_id=ReplicaId("idle"), now_seconds=NOW_SECONDS, for_model=ModelName("wide"))

    before = place(view, ModelName("narrow"), NOW_SECONDS, POLICY)
    meanwhile = place(fold(view, stopping), ModelName("narrow"), NOW_SECONDS, POLICY)

    assert isinstance(before, Placed)
    assert isinstance(meanwhile, Wait)
