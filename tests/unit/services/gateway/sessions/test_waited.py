"""All waits of a session count as one, and while it is served it waits for nothing."""

from __future__ import annotations

from services.gateway.sessions.waited import Waited


def test_who_waits_has_waited_since_the_request_came() -> None:
    assert Waited(since_seconds=10.0).seconds(14.0) == 4.0


def test_who_is_served_tells_nothing() -> None:
    assert Waited(since_seconds=10.0).served(14.0).seconds(99.0) == 0.0


def test_who_is_interrupted_is_no_newcomer() -> None:
    served = Waited(since_seconds=10.0).served(14.0)
    again = served.interrupted(50.0)

    assert again.seconds(51.0) == 5.0
    assert again.earlier_seconds == 4.0


def test_a_failure_while_it_waits_does_not_begin_anew() -> None:
    waits = Waited(since_seconds=10.0)

    assert waits.interrupted(12.0) is waits


def test_a_second_token_changes_nothing() -> None:
    served = Waited(since_seconds=10.0).served(14.0)

    assert served.served(20.0) is served
