"""Ready counters in shared memory."""

from __future__ import annotations

import mmap
import os

import pytest

from services.store.pool.counters import ReadyCounters
from stoker.errors import CapacityError


def test_what_is_set_is_seen_through_the_read_only_descriptor():
    counters = ReadyCounters(4)
    (slot,) = counters.take(1)
    descriptor = counters.read_only_descriptor()
    seen = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    counters.set(slot, 2**40 + 5)

    assert int.from_bytes(seen[counters.offset(slot) : counters.offset(slot) + 8], "little") == 2**40 + 5
    seen.close()
    os.close(descriptor)
    counters.close()


def test_a_slot_is_zero_when_it_is_taken_again():
    counters = ReadyCounters(1)
    slots = counters.take(2)
    counters.set(slots[0], 7)
    counters.give_back(slots)

    assert [counters.get(slot) for slot in counters.take(2)] == [0, 0]
    counters.close()


def test_more_than_there_are_is_refused():
    counters = ReadyCounters(1)

    with pytest.raises(CapacityError, match="513 weights files"):
        counters.take(513)
    counters.close()
