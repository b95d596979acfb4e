"""Shared memory on the largest pages the host gives."""

from __future__ import annotations

import os

import pytest

from services.store.pool.page_ladder import measured_page_bytes, open_shared_memory, smaps_fields
from services.store.settings import HugeTmpfs
from stoker.attach.memory import HUGE_PAGE_BYTES
from stoker.errors import ConfigError
from stoker.units import KIB

SMAPS = """\
7f0000000000-7f0000400000 rw-s 00000000 00:01 1 /memfd:stoker-pool (deleted)
Size:               4096 kB
KernelPageSize:        4 kB
Rss:                4096 kB
ShmemPmdMapped:     2048 kB
VmFlags: rd wr sh mr mw me ms sd
7f0000400000-7f0000500000 rw-p 00000000 00:00 0
Rss:                  12 kB
"""


def test_the_fields_of_one_mapping_are_read():
    assert smaps_fields(SMAPS, 0x7F0000000000) == {
        "Size": 4096 * KIB,
        "KernelPageSize": 4 * KIB,
        "Rss": 4096 * KIB,
        "ShmemPmdMapped": 2048 * KIB,
    }


def test_a_mapping_that_is_not_there_has_no_fields():
    assert smaps_fields(SMAPS, 0x1234000) == {}


@pytest.fixture
def shared():
    memory = open_shared_memory(
        4 * HUGE_PAGE_BYTES, chunk_bytes=HUGE_PAGE_BYTES, huge_tmpfs_dir=None, huge_tmpfs=HugeTmpfs.OFF
    )
    yield memory
    os.close(memory.descriptor)


def test_some_rung_always_holds_and_its_memory_can_be_written(shared):
    shared.memory.view(HUGE_PAGE_BYTES, 5)[:] = b"bytes"

    assert os.pread(shared.descriptor, 5, HUGE_PAGE_BYTES) == b"bytes"
    assert shared.backing in {"hugetlb", "tmpfs_huge", "memfd_huge", "memfd"}


def test_the_page_size_is_measured_from_what_is_present(shared):
    shared.memory.fault_in(0, HUGE_PAGE_BYTES, write=True)

    assert measured_page_bytes(shared.memory) in {os.sysconf("SC_PAGESIZE"), HUGE_PAGE_BYTES}


def test_others_get_a_descriptor_that_cannot_change_the_memory(shared):
    descriptor = shared.read_only_descriptor()
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(descriptor, b"x", 0)
        with pytest.raises(OSError, match="Invalid argument"):
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def test_chunks_too_small_for_huge_pages_take_ordinary_ones():
    memory = open_shared_memory(
        64 * KIB, chunk_bytes=64 * KIB, huge_tmpfs_dir=None, huge_tmpfs=HugeTmpfs.PRIVATE
    )
    os.close(memory.descriptor)

    assert memory.backing == "memfd"


def test_a_folder_that_was_named_and_has_no_huge_pages_is_an_error(tmp_path):
    """Silently taking small pages would halve the speed that the operator asked for."""
    with pytest.raises(ConfigError, match="mount -t tmpfs -o huge=within_size"):
        open_shared_memory(
            HUGE_PAGE_BYTES, chunk_bytes=HUGE_PAGE_BYTES, huge_tmpfs_dir=tmp_path, huge_tmpfs=HugeTmpfs.OFF
        )
