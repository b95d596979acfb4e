"""How an agent finds the leading controller."""

from __future__ import annotations

from services.node_agent.leader_search import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    LeaderSearch,
)


def test_all_controllers_are_asked_in_turn_and_then_there_is_a_pause() -> None:
    search = LeaderSearch(["a", "b", "c"])

    steps = [(search.address, search.failed()) for _ in range(4)]

    assert steps == [("a", 0.0), ("b", 0.0), ("c", FIRST_PAUSE_SECONDS), ("a", 0.0)]


def test_the_leader_that_a_standby_names_is_asked_next() -> None:
    search = LeaderSearch(["a", "b", "c"])

    pause_seconds = search.failed("c")

    assert (search.address, pause_seconds) == ("c", 0.0)


def test_two_controllers_that_name_each_other_do_not_keep_an_agent_busy() -> None:
    search = LeaderSearch(["a", "b"])

    asked = [(search.address, search.failed("b" if search.address == "a" else "a")) for _ in range(4)]

    assert [pause for _, pause in asked].count(0.0) < len(asked)


def test_a_dead_leader_named_by_a_standby_costs_no_pause_of_its_own() -> None:
    search = LeaderSearch(["standby"])
    search.failed("dead")

    assert (search.failed(), search.address) == (FIRST_PAUSE_SECONDS, "standby")


def test_pauses_grow_to_half_a_second_and_begin_anew_when_a_leader_was_found() -> None:
    search = LeaderSearch(["a"])

    pauses = [search.failed() for _ in range(10)]
    search.found()

    assert pauses[-1] == LONGEST_PAUSE_SECONDS == max(pauses)
    assert search.failed() == FIRST_PAUSE_SECONDS
