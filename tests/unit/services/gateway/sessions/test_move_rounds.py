"""When a move's destination is level, and what of its tokens the client has not seen."""

from __future__ import annotations

import pytest

from services.gateway.sessions.move_rounds import (
    MAX_HOLD_SECONDS,
    MAX_ROUNDS,
    MAX_SHIP_ROUNDS,
    SHIP_LEVEL_TOKENS,
    SHIP_SECONDS,
    Abandon,
    Again,
    Diverged,
    Switch,
    after_round,
    hold_seconds,
    ship_within_seconds,
    ships_on,
    unseen,
)
from tests.unit.services.gateway.builders import event

LOG = [10, 11, 12, 13]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_level_destination_takes_over_at_once(lag: int) -> None:
    assert after_round(number=1, lag=lag, earlier_lag=None) == Switch()


def test_a_source_that_can_be_held_stands_still_for_the_last_round() -> None:
    assert after_round(number=1, lag=1, earlier_lag=None, can_hold=True) == Again(is_held=True)
    assert after_round(number=3, lag=3, earlier_lag=3, can_hold=True) == Again(is_held=True)
    assert after_round(number=2, lag=9, earlier_lag=30, can_hold=True) == Again()
    assert after_round(number=1, lag=0, earlier_lag=None, can_hold=True) == Switch()


def test_a_source_stands_still_for_some_of_its_steps_and_never_long() -> None:
    assert hold_seconds(0.0) < hold_seconds(0.1) < hold_seconds(0.2)
    assert hold_seconds(0.1) >= 0.4
    assert hold_seconds(60.0) == MAX_HOLD_SECONDS


def test_rounds_go_on_while_they_make_the_lag_smaller() -> None:
    assert after_round(number=1, lag=40, earlier_lag=None) == Again()
    assert after_round(number=2, lag=3, earlier_lag=40) == Again()


def test_a_small_lag_that_does_not_shrink_is_taken() -> None:
    assert after_round(number=3, lag=3, earlier_lag=3) == Switch()


def test_a_destination_that_never_catches_up_is_given_up() -> None:
    assert after_round(number=2, lag=9, earlier_lag=9) == Again()
    assert isinstance(after_round(number=MAX_ROUNDS, lag=9, earlier_lag=9), Abandon)


def test_tokens_the_client_has_are_dropped() -> None:
    rest = unseen(event(2, [12, 13, 14, 15], epoch=3), LOG, 3)

    assert (rest.position, [token.id for token in rest.tokens], rest.epoch) == (4, [14, 15], 3)


def test_an_event_the_client_has_whole_keeps_its_finish() -> None:
    rest = unseen(event(3, [13], finish=2, epoch=3), LOG, 3)

    assert (list(rest.tokens), rest.finish_reason) == ([], 2)


def test_new_tokens_pass_as_they_are() -> None:
    new = event(4, [14], epoch=3)

    assert unseen(new, LOG, 3) is new


def test_other_tokens_than_the_client_has_are_refused() -> None:
    with pytest.raises(Diverged, match="12, 99"):
        unseen(event(2, [12, 99], epoch=3), LOG, 3)


def test_an_earlier_owners_event_is_left_to_the_fence() -> None:
    stale = event(2, [99], epoch=2)

    assert unseen(stale, LOG, 3) is stale


def test_rounds_of_shipping_go_on_until_one_pass_computes_what_is_missing() -> None:
    assert ships_on(number=0, missing=500, earlier_missing=0)
    assert ships_on(number=1, missing=40, earlier_missing=500)
    assert not ships_on(number=2, missing=SHIP_LEVEL_TOKENS, earlier_missing=40)


def test_a_session_of_few_tokens_is_not_worth_shipping() -> None:
    assert not ships_on(number=0, missing=SHIP_LEVEL_TOKENS, earlier_missing=0)


def test_shipping_that_gains_nothing_ends() -> None:
    assert not ships_on(number=2, missing=40, earlier_missing=40)
    assert not ships_on(number=MAX_SHIP_ROUNDS, missing=20, earlier_missing=40)


def test_a_round_of_shipping_has_half_of_the_time_there_is() -> None:
    assert ship_within_seconds(None) == SHIP_SECONDS / 2
    assert ship_within_seconds(20.0) == 10.0
    assert ship_within_seconds(1_000.0) == SHIP_SECONDS / 2


def test_a_source_that_is_about_to_end_is_told_to_hurry_however_late_it_is() -> None:
    assert 0.0 < ship_within_seconds(0.0) < 1.0
