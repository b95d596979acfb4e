"""How long N stores take over links of one rate, and what leaves each link: the decisions alone."""

from __future__ import annotations

import pytest

from tests.unit.services.store.peers.linked import ORIGIN, LinkedFleet


@pytest.mark.parametrize(("stores", "times"), [(1, 1.05), (2, 1.3), (4, 1.45), (8, 1.6)])
@pytest.mark.parametrize("rate", [40.0, 2.0])
def test_many_stores_have_the_file_little_later_than_one_link_needs_for_one_copy(stores, times, rate):
    fleet = LinkedFleet(stores, chunks=64, chunks_per_second=rate)
    for number in range(stores):
        fleet.at(fleet.random.uniform(0, 0.02), lambda number=number: fleet.join(f"s{number}"))
    ended = when_all_have_it(fleet)

    assert fleet.origin == dict.fromkeys(range(64), 1)
    assert ended <= times * fleet.one_copy_seconds  # at 2 chunks a second each takes longer than patience


def test_who_begins_early_sends_what_it_has_once_and_the_late_ones_send_it_on():
    fleet = LinkedFleet(3, chunks=64, chunks_per_second=20.0)
    fleet.join("early")
    for number in range(3):
        fleet.at(1.0, lambda number=number: fleet.join(f"s{number}"))
    ended = when_all_have_it(fleet)

    assert fleet.sent_from[ORIGIN] == 64
    assert fleet.sent_from["early"] <= 2 * 64  # three late ones, each lacks all: 192 if it sent all to each
    assert ended - 1.0 <= 1.4 * fleet.one_copy_seconds


def when_all_have_it(fleet: LinkedFleet) -> float:
    """Run; returns when the last chunk arrived."""
    last = 0.0
    fetched = fleet._fetched

    def note(name, choice) -> None:
        nonlocal last
        fetched(name, choice)
        last = fleet.now

    fleet._fetched = note
    fleet.run()
    assert not fleet.unfinished()
    return last
