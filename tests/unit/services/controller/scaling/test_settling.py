"""A new leader leaves what runs alone until its nodes have reported."""

from __future__ import annotations

import pytest

from services.controller.scaling.settling import Settling
from tests.unit.services.controller.builders import a_node, a_reservation, a_view

SETTLING = Settling(began_seconds=100.0, settling_seconds=1.0, node_timeout_seconds=5.0)


def test_where_nothing_ran_before_there_is_nothing_to_leave_alone() -> None:
    assert SETTLING.until_seconds(a_view(), 100.0) == 100.0


@pytest.mark.parametrize(("reported", "until_seconds"), [(True, 101.0), (False, 105.0)])
def test_a_node_with_replicas_is_waited_for_until_it_counts_as_unreachable(
    reported: bool,  # noqa: FBT001 - a parameter of the test
    until_seconds: float,
) -> None:
    nodes = (a_node("a"),) if reported else ()
    view = a_view(nodes=nodes, reservations=(a_reservation(node_id="a", adopted=True),))

    assert SETTLING.until_seconds(view, 100.2) == until_seconds


def test_it_is_over_once_and_for_all() -> None:
    view = a_view(reservations=(a_reservation(node_id="a", adopted=True),))

    assert SETTLING.until_seconds(view, 105.0) == 105.0
