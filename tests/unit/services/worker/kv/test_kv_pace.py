"""Shipping takes its share of the time, however many sessions leave."""

from __future__ import annotations

import pytest

from services.worker.kv.kv_pace import KvPace


def test_a_piece_is_followed_by_the_rest_of_its_share() -> None:
    assert KvPace(0.25).rest_seconds(0.1, 5.0) == pytest.approx(0.3)


def test_all_of_the_time_needs_no_rest() -> None:
    assert KvPace(1.0).rest_seconds(0.1, 5.0) == 0.0


def test_sessions_that_leave_at_once_share_the_share() -> None:
    pace = KvPace(0.5)

    rests = [pace.rest_seconds(0.1, 5.0) for _ in range(3)]

    assert rests == pytest.approx([0.1, 0.2, 0.3])
    assert pace.rest_seconds(0.1, 9.0) == pytest.approx(0.1)
