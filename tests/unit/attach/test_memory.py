"""Ranges of virtual memory and what is mapped into them."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from stoker.attach.memory import HUGE_PAGE_BYTES, Access, MappedRange
from stoker.errors import StokerError

PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture
def arena():
    descriptor = os.memfd_create("arena")
    os.ftruncate(descriptor, 8 * PAGE)
    yield descriptor
    os.close(descriptor)


def mapped_pages(address: int) -> bool:
    """Whether a mapping of this process starts at the address."""
    return f"{address:x}-" in Path("/proc/self/maps").read_text()


def test_ranges_start_where_huge_pages_can_be_mapped():
    assert MappedRange(5).address % HUGE_PAGE_BYTES == 0


def test_scattered_pieces_read_as_one_buffer(arena):
    for page in range(8):
        os.pwrite(arena, bytes([page]) * PAGE, page * PAGE)
    memory = MappedRange(3 * PAGE)
    for at, page in enumerate((6, 1, 4)):
        memory.map(at * PAGE, arena, page * PAGE, PAGE, Access.copy_on_write)

    assert bytes(memory.view(0, 3 * PAGE)) == b"".join(bytes([page]) * PAGE for page in (6, 1, 4))


def test_what_the_daemon_writes_after_the_mapping_was_read_is_seen(arena):
    memory = MappedRange(PAGE)
    memory.map(0, arena, 0, PAGE, Access.copy_on_write)
    before = bytes(memory.view(0, 4))
    os.pwrite(arena, b"late", 0)

    assert (before, bytes(memory.view(0, 4))) == (bytes(4), b"late")


def test_a_write_changes_this_process_only(arena):
    memory, other = MappedRange(PAGE), MappedRange(PAGE)
    for each in (memory, other):
        each.map(0, arena, 0, PAGE, Access.copy_on_write)
    memory.view(0, 4)[:] = b"mine"

    assert os.pread(arena, 4, 0) == bytes(4)
    assert bytes(other.view(0, 4)) == bytes(4)


def test_a_view_keeps_the_range_mapped_and_its_end_unmaps_it(arena):
    memory = MappedRange(PAGE)
    memory.map(0, arena, 0, PAGE, Access.copy_on_write)
    address = memory.address
    view = memory.view(0, 4)
    del memory
    gc.collect()
    assert mapped_pages(address)
    assert bytes(view) == bytes(4)

    del view
    gc.collect()
    assert not mapped_pages(address)


def test_pieces_outside_of_the_range_are_refused(arena):
    memory = MappedRange(PAGE)

    with pytest.raises(ValueError, match="does not lie in"):
        memory.map(0, arena, 0, 2 * PAGE, Access.copy_on_write)
    with pytest.raises(ValueError, match="does not lie in"):
        memory.view(1, PAGE)


def test_faulting_in_changes_nothing_that_is_there(arena):
    os.pwrite(arena, b"here", 0)
    memory = MappedRange(8 * PAGE)
    memory.map(0, arena, 0, 8 * PAGE, Access.shared)

    memory.fault_in(0, 8 * PAGE, write=True)

    assert os.pread(arena, 4, 0) == b"here"


def test_more_than_there_are_addresses_is_an_error():
    with pytest.raises(StokerError, match=r"mapping .* failed"):
        MappedRange(1 << 60)
