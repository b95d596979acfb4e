"""Who asks for a model tells how long it has waited, and is believed within reason."""

from __future__ import annotations

import pytest

from services.controller.cluster_view.demand import MAX_WAITED_SECONDS, began_seconds, demanded


def test_the_one_that_has_waited_longest_counts_whenever_it_comes() -> None:
    first = demanded(None, 0.0, 0.0, 100.0)
    both = demanded(first, 30.0, 0.0, 110.0)

    assert (first.since_seconds, first.waiters) == (100.0, 1)
    assert (both.since_seconds, both.urgent_since_seconds, both.waiters) == (80.0, 80.0, 2)


def test_what_was_waited_before_it_was_served_makes_urgent_and_reaches_no_bound() -> None:
    demand = demanded(None, 130.0, 125.0, 1_000.0)

    assert demand.since_seconds == 995.0
    assert demand.urgent_since_seconds == 870.0


@pytest.mark.parametrize(
    ("said", "believed"),
    [(5.0, 5.0), (-5.0, 0.0), (float("nan"), 0.0), (float("inf"), MAX_WAITED_SECONDS)],
)
def test_a_wait_that_cannot_be_is_not_believed(said: float, believed: float) -> None:
    assert began_seconds(said, 0.0) == -believed


@pytest.mark.parametrize("earlier", [-5.0, float("nan"), 50.0])
def test_earlier_waits_that_cannot_be_put_no_beginning_in_the_future(earlier: float) -> None:
    demand = demanded(None, 10.0, earlier, 100.0)

    assert 90.0 <= demand.since_seconds <= 100.0
    assert demand.urgent_since_seconds == 90.0
