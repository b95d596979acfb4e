"""Which bytes of a file are there: against a set of numbers."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from services.store.disk_cache.intervals import Intervals

RANGES = st.lists(
    st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 40)).map(
        lambda drawn: (drawn[0], min(drawn[1:]), max(drawn[1:]))
    ),
    max_size=12,
)


@given(RANGES, st.integers(0, 40), st.integers(0, 40))
def test_ranges_are_a_set_of_bytes(changes, begin, end):
    intervals, expected = Intervals(), set()
    for add, low, high in changes:
        if add:
            intervals.add(low, high)
            expected |= set(range(low, high))
        else:
            intervals.remove(low, high)
            expected -= set(range(low, high))

    assert {at for low, high in intervals.ranges() for at in range(low, high)} == expected
    assert intervals.total() == len(expected)
    assert intervals.covers(begin, end) == expected.issuperset(range(begin, end))


@given(RANGES)
def test_touching_ranges_are_one(changes):
    intervals = Intervals()
    for _, low, high in changes:
        intervals.add(low, high)

    ranges = intervals.ranges()
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ranges))
