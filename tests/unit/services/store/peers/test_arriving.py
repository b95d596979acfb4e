"""What senders see of a chunk that is coming in."""

from __future__ import annotations

from services.store.peers.arriving import Arriving


def test_bytes_are_there_as_they_are_told_and_never_fewer():
    chunk = Arriving(memoryview(bytes(10)))
    chunk.advance(4)
    chunk.advance(2)  # an attempt that began anew

    assert chunk.after(0, seconds=0) == (4, None)


def test_a_chunk_that_is_whole_has_all_its_bytes():
    chunk = Arriving(memoryview(bytes(10)))
    chunk.end(whole=True)

    assert chunk.after(0, seconds=0) == (10, True)


def test_only_the_first_end_counts():
    chunk = Arriving(memoryview(bytes(10)))
    chunk.advance(3)
    chunk.end(whole=False)
    chunk.end(whole=True)
    chunk.advance(10)

    assert chunk.ended
    assert chunk.after(0, seconds=0) == (3, False)
