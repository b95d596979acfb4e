"""Which reads fill a checkpoint's chunks."""

from __future__ import annotations

import pytest

from services.store.pool.resident import ResidentFile
from services.store.reading.lanes import Lane
from services.store.reading.read_plan import (
    FIRST_CHUNKS,
    MAX_RUN_CHUNKS,
    ReadingDisk,
    chunks_per_read,
    plan_reads,
)
from services.store.reading.read_queue import Urgency
from stoker.units import GB, MIB

CHUNK = 4096


class NeverRead:
    """A source that is only named."""

    name = "a"

    def read(self, chunk, *, offset, length):
        """Refuse."""
        raise AssertionError

    def close(self):
        """Refuse."""
        raise AssertionError


def file_of(chunks: int, *, lane: Lane = Lane.DISK, together: int = 1, short: int = 1) -> ResidentFile:
    return ResidentFile(
        size_bytes=chunks * CHUNK - short,
        chunk_bytes=CHUNK,
        chunks=tuple(range(chunks)),
        slot=0,
        source=NeverRead(),
        lane=lane,
        together=together,
    )


def plan(*files: ResidentFile, per_read: int, in_order: bool = False):
    memory = memoryview(bytearray(CHUNK))
    return plan_reads(
        files, load=1, ranks=False, memory=lambda _chunk: memory, per_read=per_read, in_order=in_order
    )


@pytest.mark.parametrize("chunks", [1, 3, 4, 5, 11, 12])
@pytest.mark.parametrize("per_read", [1, 3, 4])
@pytest.mark.parametrize("in_order", [True, False])
def test_reads_cover_a_file_once_and_to_its_last_byte(chunks, per_read, in_order):
    reads = plan(file_of(chunks), per_read=per_read, in_order=in_order)

    assert [at for read in reads for at in range(read.index, read.index + len(read.chunks))] == list(
        range(chunks)
    )
    assert sum(read.length for read in reads) == chunks * CHUNK - 1
    assert [read.offset for read in reads] == [read.index * CHUNK for read in reads]


def test_the_first_chunks_of_a_load_used_in_order_come_one_by_one_and_the_others_in_runs():
    reads = plan(file_of(FIRST_CHUNKS + 7), per_read=3, in_order=True)

    assert [len(read.chunks) for read in reads] == [1] * FIRST_CHUNKS + [3, 3, 1]


def test_a_load_that_is_used_when_it_is_whole_comes_in_the_fewest_reads():
    reads = plan(file_of(19), per_read=4)

    assert [len(read.chunks) for read in reads] == [4, 4, 4, 4, 3]


def test_what_comes_from_afar_is_not_read_in_longer_runs():
    reads = plan(file_of(6, lane=Lane.FAR, together=2), per_read=4)

    assert [len(read.chunks) for read in reads] == [2, 2, 2]


@pytest.mark.parametrize(
    ("rate", "urgency", "expected"),
    [
        (None, Urgency.DEMAND, 1),
        (0.15 * GB, Urgency.DEMAND, 1),
        (1 * GB, Urgency.DEMAND, 3),
        (1 * GB, Urgency.PREFETCH, 1),
        (100 * GB, Urgency.PREFETCH, MAX_RUN_CHUNKS),
    ],
)
def test_a_fast_disk_is_read_in_longer_runs_where_nobody_more_urgent_may_come(rate, urgency, expected):
    length = chunks_per_read(
        ReadingDisk(bytes_per_second=rate, threads=4),
        chunk_bytes=16 * MIB,
        urgency=urgency,
    )

    assert length == expected


@pytest.mark.parametrize(("load", "expected"), [(0.3 * GB, 1), (1.5 * GB, 2), (3 * GB, MAX_RUN_CHUNKS)])
def test_a_small_load_that_a_forward_pass_follows_is_read_in_shorter_runs(load, expected):
    disk = ReadingDisk(bytes_per_second=100 * GB, threads=4)

    assert chunks_per_read(disk, chunk_bytes=16 * MIB, followed_bytes=int(load)) == expected
