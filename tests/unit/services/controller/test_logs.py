"""What operators are told: decisions with their outcomes, and events."""

from __future__ import annotations

import pytest

from services.controller.cluster_view.view import Policy
from services.controller.decision_log import MAX_DECISIONS, DecisionLog
from services.controller.event_log import EventLog
from services.controller.placement.place import Wait, place
from stoker.ids import ModelName, ReplicaId
from stoker.v1 import start_pb2
from tests.unit.services.controller.builders import NOW_SECONDS, a_model, a_node, a_view

M = ModelName("m")


def test_a_start_is_explained_by_model_and_by_request_with_prediction_and_outcome() -> None:
    decisions = DecisionLog()
    view = a_view(models=(a_model(),), nodes=(a_node("a"), a_node("b", warm_workers=0)))

    decisions.add(M, place(view, M, NOW_SECONDS, Policy()), {"req-1"}, 5.0)
    decisions.started(M, ReplicaId("m.1"))
    decisions.ready(ReplicaId("m.1"), start_pb2.StartTimings(total_seconds=2.0, predicted_seconds=1.5))

    [found] = decisions.explain("req-1", 0)
    assert found == decisions.explain("m", 0)[0]
    assert (found.choice, found.outcome, found.measured.total_seconds) == ("start", "ready", 2.0)
    assert [option.node_id for option in found.options] == ["a", "b"]


def test_a_start_that_failed_after_it_was_accepted_says_why_and_one_that_was_ready_stays_so() -> None:
    decisions = DecisionLog()
    view = a_view(models=(a_model(),), nodes=(a_node("a"),))
    for replica_id in ("m.1", "m.2"):
        decisions.add(M, place(view, M, NOW_SECONDS, Policy()), (), 5.0)
        decisions.started(M, ReplicaId(replica_id))

    decisions.ready(ReplicaId("m.1"), start_pb2.StartTimings(total_seconds=2.0))
    decisions.failed(ReplicaId("m.1"), "its worker died")
    decisions.failed(ReplicaId("m.2"), "the disk is gone")

    second, first = decisions.explain("m", 0)
    assert (first.outcome, first.outcome_message) == ("ready", "")
    assert (second.outcome, second.outcome_message) == ("failed", "the disk is gone")


def test_a_decision_that_only_repeats_itself_is_kept_once_and_the_log_is_bounded() -> None:
    decisions = DecisionLog()
    for _ in range(3):
        decisions.add(M, Wait(reason="no free room"), (), 1.0)
    once = len(decisions.explain("m", 99))
    for number in range(MAX_DECISIONS + 5):
        decisions.add(M, Wait(reason=f"reason {number}"), (), 1.0)

    assert once == 1
    assert len(decisions.explain("m", MAX_DECISIONS * 2)) == MAX_DECISIONS


@pytest.mark.asyncio
async def test_events_are_told_oldest_first_and_a_reader_ends_with_the_term() -> None:
    events = EventLog()
    for number in range(3):
        events.add("replica.ready", 1.0, replica_id=f"r{number}", seconds=0.5)

    past = [event.fields["replica_id"] async for event in events.read(2, follow=False)]
    events.end()
    followed = [event.sequence async for event in events.read(0, follow=True)]

    assert past == ["r1", "r2"]
    assert followed == [1, 2, 3]
