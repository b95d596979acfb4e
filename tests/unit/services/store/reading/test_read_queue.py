"""Whose chunk is read next."""

from __future__ import annotations

from pathlib import Path

from services.store.reading.read_queue import ChunkRead, ReadOrder, Urgency
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
