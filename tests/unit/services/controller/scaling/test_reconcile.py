"""Looks at which nothing is due end early; nobody is left out by that."""

from __future__ import annotations

from dataclasses import replace

from services.controller.cluster_view.demand import Refusal
from services.controller.cluster_view.events import Demanded, Released
from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.index import indexed
from services.controller.cluster_view.view import Policy
from services.controller.scaling.actions import Note, Plan, Release, Start, Stop
from services.controller.scaling.reconcile import reconcile
from stoker.ids import ModelName, NodeId, ReplicaId
from tests.unit.services.controller.builders import (
    NOW_SECONDS,
    a_model,
    a_node,
    a_replica,
    a_reservation,
    a_view,
)

POLICY = Policy()


def test_a_replica_that_nobody_reserved_is_stopped_though_no_model_is_due() -> None:
    """It belongs to no model, so that none is due for it."""
    orphan = a_replica("orphan", "gone", first_seen_seconds=NOW_SECONDS - POLICY.orphan_grace_seconds)
    view = indexed(a_view(nodes=(a_node("a", replicas=(orphan,)),)))

    plan = reconcile(view, NOW_SECONDS, POLICY)

    assert [(type(each), each.replica_id) for each in plan.actions if isinstance(each, Stop)] == [
        (Stop, "orphan")
    ]


def test_a_replica_whose_node_never_came_is_released_though_nothing_happens() -> None:
    """No report makes its model due: it is, as long as its node is not in the cluster."""
    reservation = a_reservation("r", "m", "lost", reported=False, seen_seconds=NOW_SECONDS)
    view = indexed(a_view(models=(a_model("m"),), reservations=(reservation,)))
    late_seconds = NOW_SECONDS + POLICY.node_timeout_seconds

    early = reconcile(view, NOW_SECONDS, POLICY)
    late = reconcile(view, late_seconds, POLICY)

    assert early.actions == ()
    assert early.next_due_seconds == late_seconds
    assert any(isinstance(each, Release | Note) for each in late.actions)


def test_a_model_that_waits_is_placed_once_there_is_room_though_it_is_not_asked_for_again() -> None:
    """Room is news to it, whoever made that: it is due at every look."""
    refusal = Refusal(reason="no room", at_seconds=NOW_SECONDS, disturbs=True)
    busy = a_replica("r", "other", sessions=1, idle_since_seconds=None)
    view = a_view(
        models=(a_model("m"), a_model("other")),
        nodes=(a_node("a", replicas=(busy,)),),
        reservations=(a_reservation("r", "other", "a"),),
        refusals={ModelName("m"): refusal},
    )
    view = fold(view, Demanded(model=ModelName("m"), now_seconds=NOW_SECONDS))
    assert reconcile(view, NOW_SECONDS, POLICY).actions == ()

    freed = replace(view.nodes[NodeId("a")], replicas={})
    view = fold(replace(view, nodes={NodeId("a"): freed}, index=None), Released(replica_id=ReplicaId("r")))
    plan = reconcile(view, NOW_SECONDS, POLICY)

    assert [each.model for each in plan.actions if isinstance(each, Start)] == ["m"]


def test_a_look_at_a_quiet_cluster_says_when_the_next_one_is_due() -> None:
    view = indexed(a_view(models=(a_model("m"),), nodes=(a_node("a"),)))

    plan = reconcile(view, NOW_SECONDS, POLICY)

    assert plan == Plan(actions=(), next_due_seconds=NOW_SECONDS + POLICY.node_timeout_seconds)
