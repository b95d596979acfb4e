"""What is learnt: rates in spite of outliers, the line of moves, when a model is asked for again."""

from __future__ import annotations

import pytest

from services.controller.cluster_view.bandwidth import learn, rate_of
from services.controller.cluster_view.forecast import (
    arrived,
    keep_alive_seconds,
    keep_until_seconds,
    likelihood,
    window,
)
from services.controller.cluster_view.learnt import Arrivals, Learnt, MoveCost, Moved, Transferred
from services.controller.cluster_view.moves import learn_move, move_seconds
from services.controller.cluster_view.view import Policy
from stoker.ids import ModelName
from stoker.units import GB
from tests.unit.services.controller.builders import a_model, a_view

M = ModelName("m")


def learnt(*gigabytes_per_second: float, seed: float = 0.0) -> Learnt:
    found = None
    for number, rate in enumerate(gigabytes_per_second):
        transferred = Transferred(tier="disk", bytes=GB, seconds=1 / rate)
        found = learn(found, transferred, float(number), seed=seed * GB)
    assert found is not None
    return found


def test_a_rate_settles_at_what_is_measured_whatever_the_seed_was() -> None:
    assert rate_of(learnt(*[3.0] * 30, seed=0.5)) == pytest.approx(3.0 * GB, rel=0.1)


def test_one_stall_moves_a_settled_rate_by_little() -> None:
    assert rate_of(learnt(*[2.0] * 20, 0.01)) > 1.9 * GB


def test_a_disk_that_has_become_slower_is_believed_after_some_starts() -> None:
    assert rate_of(learnt(*[4.0] * 20, *[1.0] * 60)) < 1.3 * GB


def test_a_transfer_too_small_to_tell_a_rate_teaches_none() -> None:
    small = Transferred(tier="disk", bytes=700_000, seconds=0.2)

    assert learn(None, small, 0.0, seed=0.0) is None
    assert learn(learnt(2.0), small, 1.0, seed=0.0) == learnt(2.0)


def test_moves_are_a_line_through_what_was_measured() -> None:
    cost: MoveCost | None = None
    for tokens in (100, 1000, 3000, 500):
        moved = Moved(
            migration_id=str(tokens), model=M, path="ship", tokens=tokens, seconds=0.3 + 0.001 * tokens
        )
        cost = learn_move(cost, moved)
    assert cost is not None
    view = a_view(models=(a_model(),), moves={(M, "ship"): cost})

    assert move_seconds(view, M, 2000, Policy()) == pytest.approx(2.3, rel=0.01)
    assert move_seconds(view, ModelName("other"), 2000, Policy()) == pytest.approx(1.2)


def history(*gaps_seconds: float) -> Arrivals:
    at_seconds, found = 0.0, arrived(None, 0.0)
    for gap_seconds in gaps_seconds:
        at_seconds += gap_seconds
        found = arrived(found, at_seconds)
    return found


def test_a_model_asked_for_every_half_hour_is_stopped_at_once_and_expected_back() -> None:
    arrivals, model = history(*[1830.0] * 10), a_model(keep_alive_auto=True, keep_alive_seconds=600.0)

    found = window(arrivals)

    assert found is not None
    assert 1500 < found.prewarm_seconds < 1830 < found.keep_seconds
    assert keep_alive_seconds(model, arrivals) == 0.0
    started_seconds = arrivals.last_seconds + found.prewarm_seconds + 1
    assert keep_until_seconds(model, arrivals, started_seconds) == arrivals.last_seconds + found.keep_seconds


def test_a_model_asked_for_all_the_time_is_kept_no_longer_than_its_owner_said() -> None:
    arrivals = history(*[20.0] * 30)

    assert keep_alive_seconds(a_model(keep_alive_auto=True, keep_alive_seconds=300.0), arrivals) < 100
    assert keep_alive_seconds(a_model(keep_alive_auto=True, keep_alive_seconds=30.0), arrivals) == 30.0


@pytest.mark.parametrize("gaps", [[60.0] * 3, [20_000.0] * 20])
def test_a_history_that_says_little_leaves_the_set_keep_alive(gaps: list[float]) -> None:
    model = a_model(keep_alive_auto=True, keep_alive_seconds=300.0)

    assert window(history(*gaps)) is None
    assert keep_alive_seconds(model, history(*gaps)) == 300.0


def test_what_was_asked_for_every_minute_is_likely_soon_and_what_never_returned_is_not() -> None:
    minutely = history(*[60.0] * 10)
    daily = history(*[86_400.0] * 10)

    assert likelihood(minutely, minutely.last_seconds, 300.0) == 1.0
    assert likelihood(daily, daily.last_seconds, 300.0) == 0.0
    assert likelihood(history(), 0.0, 300.0) == 0.0


def test_a_silence_longer_than_every_gap_makes_a_model_less_and_less_likely() -> None:
    found = history(*[60.0] * 10)
    after = [likelihood(found, found.last_seconds + silence, 300.0) for silence in (600.0, 6_000.0, 60_000.0)]

    assert after == sorted(after, reverse=True)
    assert after[0] < 0.5
    assert after[-1] < 0.01
