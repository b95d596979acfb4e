"""Shipping takes its share of the time, however many sessions leave, and more of it only where it must."""

from __future__ import annotations

import pytest

from services.worker.kv.kv_pace import KvPace


def test_a_piece_is_followed_by_the_rest_of_its_share() -> None:
    pace = KvPace(0.25)

    assert pace.rest_seconds(pace.begin(10), 0.1, 5.0) == pytest.approx(0.3)


def test_all_of_the_time_needs_no_rest() -> None:
    pace = KvPace(1.0)

    assert pace.rest_seconds(pace.begin(10), 0.1, 5.0) == 0.0


def test_sessions_that_leave_at_once_share_the_share() -> None:
    pace = KvPace(0.5)
    leaving = [pace.begin(10) for _ in range(3)]

    rests = [pace.rest_seconds(departure, 0.1, 5.0) for departure in leaving]

    assert rests == pytest.approx([0.1, 0.2, 0.3])
    assert pace.rest_seconds(leaving[0], 0.1, 9.0) == pytest.approx(0.1)


def test_who_has_time_enough_takes_no_more_than_the_share() -> None:
    pace = KvPace(0.25)
    departure = pace.begin(11, until_seconds=15.0)

    assert pace.rest_seconds(departure, 0.1, 5.0) == pytest.approx(0.3)  # 1 s of work in 10 s


def test_who_would_be_late_takes_what_it_needs() -> None:
    pace = KvPace(0.25)
    departure = pace.begin(51, until_seconds=15.0)

    assert pace.rest_seconds(departure, 0.1, 5.0) == pytest.approx(0.1)  # 5 s of work in 10 s


def test_the_needs_of_all_that_leave_add_up_and_one_that_has_left_needs_nothing() -> None:
    pace = KvPace(0.25)
    leaving = [pace.begin(41, until_seconds=15.0) for _ in range(2)]
    for departure in leaving:
        pace.rest_seconds(departure, 0.1, 5.0)

    assert pace.share(5.0) == pytest.approx(0.8)  # twice 4 s of work in 10 s
    pace.end(leaving[0])
    assert pace.share(5.0) == pytest.approx(0.4)


def test_a_single_slow_piece_is_no_reason_to_hurry() -> None:
    pace = KvPace(0.25)
    departure = pace.begin(60, until_seconds=15.0)
    for _ in range(9):
        pace.rest_seconds(departure, 0.02, 5.0)
    pace.rest_seconds(departure, 0.1, 5.0)

    assert pace.share(5.0) == 0.25  # 50 of 0.028 s in 10 s; by the last one's time they would need half of it


def test_who_is_late_already_never_waits() -> None:
    pace = KvPace(0.25)
    departure = pace.begin(5, until_seconds=4.0)

    assert pace.rest_seconds(departure, 0.1, 5.0) == 0.0
    assert pace.share(5.0) == 1.0
