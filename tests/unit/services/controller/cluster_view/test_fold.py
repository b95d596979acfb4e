"""Folds: what the scenarios can't see, and what must never change by accident."""

from __future__ import annotations

from services.controller.cluster_view.demand import Failure
from services.controller.cluster_view.events import (
    Distrusted,
    ModelPut,
    NodeReported,
    Released,
    StartFailed,
    StopOrdered,
    StopRefused,
)
from services.controller.cluster_view.fold import fold, fold_all
from services.controller.cluster_view.learnt import StartStages
from services.controller.cluster_view.view import Phase, View
from stoker.ids import ModelName, ReplicaId
from tests.unit.services.controller.builders import (
    NOW_SECONDS,
    a_model,
    a_node,
    a_replica,
    a_reservation,
    a_view,
)

M = ModelName("m")
R = ReplicaId("r")


def test_a_fold_leaves_the_view_before_it_alone() -> None:
    before = a_view(models=(a_model(),), nodes=(a_node(),), reservations=(a_reservation(),))
    copy = a_view(models=(a_model(),), nodes=(a_node(),), reservations=(a_reservation(),))

    fold_all(
        before,
        [
            ModelPut(model=a_model("n")),
            NodeReported(node=a_node(replicas=(a_replica(),))),
            StopOrdered(replica_id=R, now_seconds=NOW_SECONDS),
            Released(replica_id=R),
        ],
    )

    assert before == copy


def test_events_about_things_that_are_gone_change_nothing() -> None:
    events = [
        Released(replica_id=R),
        StopOrdered(replica_id=R, now_seconds=1),
        StopRefused(replica_id=R, busy=True),
        StartFailed(model=M, now_seconds=1, retry_at_seconds=2, code="x", message="y"),
    ]

    assert fold_all(View(), events) == View()


def test_a_replica_is_ready_since_its_first_report_as_ready() -> None:
    replica = a_replica(ready_since_seconds=None)
    view = fold(View(), NodeReported(node=a_node(replicas=(replica,), last_seen_seconds=5.0)))
    view = fold(view, NodeReported(node=a_node(replicas=(replica,), last_seen_seconds=9.0)))

    found = next(iter(view.nodes.values())).replicas[R]
    assert (found.first_seen_seconds, found.ready_since_seconds) == (5.0, 5.0)


def test_each_start_is_learnt_from_once_and_clears_the_models_failures() -> None:
    failure = Failure(count=2, at_seconds=1, retry_at_seconds=3, code="load_failed", message="")
    stages = StartStages(skeleton_seconds=1.0)
    view = a_view(models=(a_model(),), reservations=(a_reservation(),), failures={M: failure})

    for phase in (Phase.STARTING, Phase.READY, Phase.READY):
        replica = a_replica(phase=phase, stages=stages, ready_since_seconds=None)
        view = fold(view, NodeReported(node=a_node(replicas=(replica,))))

    assert dict(view.measured) == {M: (stages,)}
    assert not view.failures


def test_what_was_learnt_is_forgotten_when_the_model_becomes_another() -> None:
    failure = Failure(count=2, at_seconds=1, retry_at_seconds=3, code="load_failed", message="")
    view = a_view(models=(a_model(),), failures={M: failure}, measured={M: (StartStages(),)})

    same = fold(view, ModelPut(model=a_model(keep_alive_seconds=1)))
    other = fold(view, ModelPut(model=a_model(runtime="v2")))

    assert (set(same.failures), set(same.measured)) == ({M}, {M})
    assert (len(other.failures), len(other.measured)) == (0, 0)


def test_trust_comes_back_with_the_nodes_next_report() -> None:
    view = a_view(nodes=(a_node(replicas=(a_replica(),)),), reservations=(a_reservation(),))
    view = fold(view, Distrusted(replica_ids=frozenset({R})))

    elsewhere = fold(view, NodeReported(node=a_node("b")))
    there = fold(view, NodeReported(node=a_node("a")))

    assert elsewhere.distrusted == {R}
    assert there.distrusted == frozenset()
