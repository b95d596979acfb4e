"""Whose chunk is read next."""

from __future__ import annotations

from pathlib import Path

from services.store.reading.read_queue import ChunkRead, ReadOrder, Urgency, shortened
from stoker.checkpoint.reading import FileSignature, SourceFile

SOURCE = SourceFile(Path("/x"), FileSignature(inode=1, size_bytes=1, modified_ns=1))


def reads(load: int, count: int) -> list[ChunkRead]:
    return [
        ChunkRead(load=load, file=0, index=index, source=SOURCE, chunks=(memoryview(bytearray(8)),), length=8)
        for index in range(count)
    ]


def drain(order: ReadOrder) -> list[tuple[int, int]]:
    found = []
    while (read := order.next()) is not None:
        found.append((read.load, read.index))
    return found


def test_chunks_of_a_load_come_in_order():
    order = ReadOrder()
    order.add(1, reads(1, 3), Urgency.DEMAND)

    assert drain(order) == [(1, 0), (1, 1), (1, 2)]


def test_a_read_cut_into_shorter_ones_brings_the_same_bytes():
    chunks = tuple(memoryview(bytearray(8)) for _ in range(5))
    whole = ChunkRead(load=1, file=2, index=3, source=SOURCE, chunks=chunks, length=37)

    cut = shortened(whole, 2)

    assert [(read.index, read.offset, read.length) for read in cut] == [(3, 24, 16), (5, 40, 16), (7, 56, 5)]
    assert [chunk for read in cut for chunk in read.chunks] == list(chunks)
    assert shortened(whole, 5) == [whole]


def test_reads_that_wait_are_changed_in_their_place():
    order = ReadOrder()
    order.add(1, reads(1, 3), Urgency.DEMAND)
    order.add(2, reads(2, 1), Urgency.DEMAND)
    order.next()

    more = order.change(1, lambda read: [read, read])

    assert more == 2
    assert drain(order) == [(2, 0), (1, 1), (1, 1), (1, 2), (1, 2)]
    assert order.change(3, lambda read: [read, read]) == 0


def test_loads_of_one_urgency_take_turns():
    order = ReadOrder()
    order.add(1, reads(1, 3), Urgency.DEMAND)
    order.add(2, reads(2, 1), Urgency.DEMAND)

    assert drain(order) == [(1, 0), (2, 0), (1, 1), (1, 2)]


def test_a_demand_goes_before_a_prefetch_that_came_first():
    order = ReadOrder()
    order.add(1, reads(1, 2), Urgency.PREFETCH)
    order.next()
    order.add(2, reads(2, 2), Urgency.DEMAND)

    assert drain(order) == [(2, 0), (2, 1), (1, 1)]


def test_a_prefetch_that_someone_waits_for_becomes_a_demand():
    order = ReadOrder()
    order.add(1, reads(1, 2), Urgency.PREFETCH)
    order.add(2, reads(2, 2), Urgency.PREFETCH)
    order.hurry(2)

    assert drain(order) == [(2, 0), (2, 1), (1, 0), (1, 1)]


def test_a_dropped_load_is_not_read_on():
    order = ReadOrder()
    order.add(1, reads(1, 3), Urgency.DEMAND)
    order.next()

    assert order.drop(1) == 2
    assert drain(order) == []
    assert order.waiting_bytes() == 0
