"""What a session does after a failure: goes on, waits, or gives up with a clear error."""

from __future__ import annotations

from typing import Any

import pytest

from services.gateway.sessions.hops import GiveUp, GoOn, HopPolicy, Hops, after
from stoker.errors import (
    CapacityError,
    ContextLengthExceeded,
    DeadlineExceeded,
    Fenced,
    InvalidRequest,
    LoadFailed,
    ModelNotFound,
    PeerError,
    QueueFull,
    ReplicaGone,
    StokerError,
    StreamLost,
    WorkerDied,
)
from tests.unit.services.gateway.builders import replica

POLICY = HopPolicy(max_attempts=3, max_hops=5, resume_timeout_seconds=60)


def decide(
    error: StokerError, hops: Hops | None = None, *, replica_id: str | None = "rep-1", **facts: Any
) -> GoOn | GiveUp:
    fields = {"tokens": 0, "begun": True, "now_seconds": 0.0, "policy": POLICY} | facts
    at = replica(replica_id) if replica_id else None
    return after(hops or Hops(), error, at=at, **fields)


def went_on(decided: GoOn | GiveUp) -> GoOn:
    assert isinstance(decided, GoOn)
    return decided


@pytest.mark.parametrize("error", [WorkerDied("x"), PeerError("x"), ReplicaGone("x"), QueueFull("x")])
def test_a_stream_that_has_begun_outlives_its_replica(error: StokerError) -> None:
    assert isinstance(decide(error, tokens=7), GoOn)


@pytest.mark.parametrize("error", [InvalidRequest("x"), StokerError("x"), Fenced("x"), DeadlineExceeded("x")])
@pytest.mark.parametrize("begun", [False, True])
def test_what_no_other_replica_can_mend_ends_the_request(error: StokerError, *, begun: bool) -> None:
    decided = decide(error, begun=begun)

    assert decided == GiveUp(error=error)


def test_a_death_is_followed_by_no_pause_and_its_replica_is_passed_over() -> None:
    decided = went_on(decide(WorkerDied("x"), tokens=7))

    assert decided.pause_seconds == 0
    assert decided.hops.failed == ("rep-1",)
    assert decided.hops.count == 1


def test_replicas_that_die_without_a_token_are_counted_for_the_request_may_kill_them() -> None:
    hops = Hops()
    for number in range(POLICY.max_attempts - 1):
        hops = went_on(decide(WorkerDied("x"), hops, replica_id=f"rep-{number}", tokens=7)).hops

    decided = decide(WorkerDied("the worker died"), hops, tokens=7)

    assert isinstance(decided, GiveUp)
    assert isinstance(decided.error, StreamLost)
    assert "3 replicas in a row failed" in decided.error.message
    assert "send the request again" in decided.error.message


def test_a_token_between_two_deaths_clears_the_count() -> None:
    hops = Hops()
    for tokens in range(1, POLICY.max_hops + 1):
        hops = went_on(decide(WorkerDied("x"), hops, tokens=tokens)).hops

    assert hops.fruitless == 1
    assert hops.count == POLICY.max_hops


def test_a_session_hops_no_more_often_than_allowed() -> None:
    decided = decide(WorkerDied("x"), Hops(count=POLICY.max_hops, tokens=1), tokens=2)

    assert isinstance(decided, GiveUp)
    assert "more than 5" in decided.error.message


def test_places_that_refuse_cost_only_time() -> None:
    hops = Hops()
    for second in range(59):
        decided = went_on(decide(QueueFull("full"), hops, tokens=3, now_seconds=float(second)))
        hops = decided.hops
        assert 0 < decided.pause_seconds <= 1

    assert hops.count == 0
    assert hops.failed == ()
    assert isinstance(decide(QueueFull("full"), hops, tokens=3, now_seconds=60), GiveUp)


def test_a_search_without_success_ends_with_what_the_client_may_do() -> None:
    hops = went_on(decide(WorkerDied("x"), tokens=3)).hops

    decided = decide(
        LoadFailed("no store", retry_after_seconds=9), hops, replica_id=None, tokens=3, now_seconds=60
    )

    assert isinstance(decided, GiveUp)
    assert decided.error.code == "stream_lost"
    assert decided.error.retry_after_seconds == 9
    assert decided.error.details == {"tokens": 3, "hops": 1, "cause": "load_failed"}
    assert "within 60 s" in decided.error.message
    assert "what was sent is right" in decided.error.message


def test_an_answer_that_was_to_be_sent_whole_is_not_said_to_have_been_sent() -> None:
    hops = went_on(decide(WorkerDied("x"), tokens=3)).hops

    decided = decide(QueueFull("full"), hops, replica_id=None, tokens=3, whole=True, now_seconds=60)

    assert isinstance(decided, GiveUp)
    assert decided.error.message.endswith("nothing of it was sent, send the request again")


def test_a_search_whose_own_time_ran_out_goes_on_while_there_is_time() -> None:
    assert isinstance(decide(DeadlineExceeded("x"), replica_id=None, tokens=1), GoOn)


def test_a_new_death_begins_a_new_search() -> None:
    hops = went_on(decide(WorkerDied("x"), tokens=3, now_seconds=0)).hops

    assert isinstance(decide(WorkerDied("x"), hops, tokens=3, now_seconds=100), GoOn)


def test_a_place_with_a_shorter_context_is_passed_over() -> None:
    decided = went_on(decide(ContextLengthExceeded("x"), tokens=3))

    assert decided.hops.failed == ("rep-1",)
    assert decided.hops.fruitless == 0


@pytest.mark.parametrize(
    "error",
    [CapacityError("x"), QueueFull("x"), LoadFailed("x"), ContextLengthExceeded("x"), ModelNotFound("x")],
)
def test_a_request_nobody_has_seen_a_token_of_is_refused_at_once_for_want_of_room(error: StokerError) -> None:
    assert decide(error, begun=False) == GiveUp(error=error)


def test_a_request_without_a_token_ends_with_the_last_replicas_own_error() -> None:
    hops = Hops()
    for _ in range(POLICY.max_attempts - 1):
        hops = went_on(decide(ReplicaGone("x"), hops, begun=False)).hops
    last = WorkerDied("the third died")

    assert decide(last, hops, begun=False) == GiveUp(error=last)


def test_a_session_of_a_request_without_a_token_is_not_begun_by_a_refused_search() -> None:
    refusal = PeerError("no controller answers")

    assert decide(refusal, replica_id=None, begun=False) == GiveUp(error=refusal)
