"""How far a file is: without gaps, and never past what was checked."""

from __future__ import annotations

from services.store.pool.resident import ResidentFile


def ready_after(arrivals: list[int], *, step_bytes: int) -> list[int]:
    """Ready bytes of a file of five chunks of 4 bytes, the last one short, after each arrival."""
    file = ResidentFile(
        size_bytes=18, chunk_bytes=4, chunks=(0, 1, 2, 3, 4), slot=0, source=None, step_bytes=step_bytes
    )
    found = []
    for index in arrivals:
        file.arrive(index)
        found.append(file.ready_bytes)
    return found


def test_bytes_are_ready_without_gaps():
    assert ready_after([1, 0, 4, 2, 3], step_bytes=1) == [0, 8, 8, 12, 18]


def test_a_digest_over_several_chunks_holds_its_bytes_back_until_it_is_whole():
    assert ready_after([0, 1, 2, 3, 4], step_bytes=8) == [0, 8, 8, 16, 18]


def test_a_digest_over_less_than_a_chunk_holds_nothing_back():
    assert ready_after([0, 1, 2, 3, 4], step_bytes=2) == [4, 8, 12, 16, 18]
