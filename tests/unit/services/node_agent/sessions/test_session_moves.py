"""Sessions that are asked to go to another replica: which ones, and by whose order."""

from __future__ import annotations

import pytest

from services.node_agent.sessions.relay import RelayedSession, SessionRelay
from services.node_agent.sessions.session_moves import ask_to_move
from stoker.errors import Fenced, ReplicaGone
from stoker.v1.node_agent_pb2 import MoveSessionsRequest
from stoker.v1.session_pb2 import GenerateRequest


def relay(*requests: str) -> tuple[SessionRelay, list[RelayedSession]]:
    made = SessionRelay(
        None,  # type: ignore[arg-type]  # no worker is spoken to
        peer="w",
        max_sessions=9,
        on_change=lambda: None,
        now_seconds=lambda: 0.0,
    )
    opened = [
        made.open(GenerateRequest(session_id=f"{request}-{number}", request_id=request, epoch=1))
        for number, request in enumerate(requests)
    ]
    return made, opened


async def test_all_sessions_of_a_request_are_told_where_to_go_and_no_others() -> None:
    made, (first, other, second) = relay("req-1", "req-2", "req-1")
    order = MoveSessionsRequest(request_id="req-1", to_replica_ids={"m": "rep-9"}, reason="r")

    asked = ask_to_move(order, {"rep-1": ("m", made)}, highest_fence=0)

    assert (asked.sessions, asked.replica_id, asked.model) == (2, "rep-1", "m")
    leaves = [(await session.next()).leave for session in (first, second)]
    assert [(leave.to_replica_id, leave.grace_seconds, leave.reason) for leave in leaves] == [
        ("rep-9", 0.0, "r")
    ] * 2
    assert not other._events


def test_a_request_whose_model_has_nowhere_to_go_is_found_and_left_alone() -> None:
    made, (session,) = relay("req-1")

    asked = ask_to_move(MoveSessionsRequest(request_id="req-1"), {"rep-1": ("m", made)}, highest_fence=0)

    assert (asked.sessions, asked.model) == (0, "m")
    assert not session._events


def test_a_request_that_runs_elsewhere_is_not_found() -> None:
    made, _ = relay("req-1")

    asked = ask_to_move(
        MoveSessionsRequest(request_id="req-2", to_replica_id="rep-9"),
        {"rep-1": ("m", made)},
        highest_fence=0,
    )

    assert asked.replica_id == ""


def test_a_whole_replicas_sessions_move_when_it_is_named() -> None:
    made, sessions = relay("req-1", "req-2")
    order = MoveSessionsRequest(replica_id="rep-1", to_replica_id="rep-9")

    assert ask_to_move(order, {"rep-1": ("m", made)}, highest_fence=0).sessions == len(sessions)
    with pytest.raises(ReplicaGone):
        ask_to_move(order, {}, highest_fence=0)


def test_a_controller_that_no_longer_leads_moves_nothing() -> None:
    made, (session,) = relay("req-1")
    order = MoveSessionsRequest(request_id="req-1", to_replica_id="rep-9", fence=3)

    with pytest.raises(Fenced, match="fence 3"):
        ask_to_move(order, {"rep-1": ("m", made)}, highest_fence=4)
    assert not session._events


def test_of_some_sessions_those_that_wait_go_first_then_the_shortest() -> None:
    made, (long, short, waiting, longest) = relay("req-1", "req-2", "req-3", "req-4")
    for session, tokens in ((long, 90), (short, 10), (waiting, 50), (longest, 100)):
        session.context_tokens = tokens
        session.started = session is not waiting
    order = MoveSessionsRequest(replica_id="rep-1", to_replica_id="rep-9", max_sessions=2)

    for _ in range(2):  # an order that comes again is about the same ones
        assert ask_to_move(order, {"rep-1": ("m", made)}, highest_fence=0).sessions == 2
        waiting.started, waiting.context_tokens = True, 500

    assert [len(session._events) for session in (long, short, waiting, longest)] == [0, 2, 2, 0]
