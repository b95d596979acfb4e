"""A window over a checkpoint that is larger than the pool."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.pool.window import WINDOW_CHUNKS, Window, window_chunks
from services.store.reading.read_queue import ChunkRead
from stoker.errors import PeerError

CHUNK = 100


def read(file: int, index: int, *, count: int = 1) -> ChunkRead:
    memory = memoryview(bytearray(CHUNK))
    return ChunkRead(
        load=1, file=file, index=index, source=None, chunks=(memory,) * count, length=count * CHUNK
    )  # fmt: skip


def window_over(*files: int, chunks: int) -> Window:
    """Files of so many whole chunks, read one by one."""
    window = Window(file_bytes=[count * CHUNK for count in files], chunk_bytes=CHUNK, chunks=chunks)
    window.hold_back(read(file, index) for file, count in enumerate(files) for index in range(count))
    return window


def given_out(window: Window) -> list[tuple[int, int]]:
    return [(each.file, each.index) for each in window.next_reads()]


def test_no_more_is_read_than_the_window_holds():
    window = window_over(5, chunks=3)
    window.join()

    assert given_out(window) == [(0, 0), (0, 1), (0, 2)]
    assert given_out(window) == []
    assert not window.all_given_out


def test_what_the_last_reader_has_used_makes_room():
    window = window_over(5, chunks=3)
    fast, slow = window.join(), window.join()
    given_out(window)
    window.consumed(fast, file=0, upto_bytes=3 * CHUNK, ready_bytes=[3 * CHUNK])

    assert given_out(window) == []
    window.consumed(slow, file=0, upto_bytes=2 * CHUNK + 1, ready_bytes=[3 * CHUNK])
    assert given_out(window) == [(0, 3), (0, 4)]
    assert window.all_given_out


def test_a_reader_that_left_is_not_waited_for():
    window = window_over(5, chunks=3)
    fast, slow = window.join(), window.join()
    given_out(window)
    window.consumed(fast, file=0, upto_bytes=3 * CHUNK, ready_bytes=[3 * CHUNK])
    window.leave(slow)

    assert given_out(window) == [(0, 3), (0, 4)]


def test_a_chunk_that_goes_to_the_disk_keeps_its_place_until_it_is_there():
    window = window_over(5, chunks=3)
    reader = window.join()
    given_out(window)
    window.landing(read(0, 1))
    window.consumed(reader, file=0, upto_bytes=3 * CHUNK, ready_bytes=[3 * CHUNK])

    assert given_out(window) == [(0, 3)]
    window.landed(read(0, 1))
    assert given_out(window) == [(0, 4)]


def test_files_follow_each_other_through_one_ring():
    window = window_over(2, 3, chunks=3)
    reader = window.join()

    assert window.ring((7, 8, 9)) == (7, 8, 9, 7, 8)
    assert given_out(window) == [(0, 0), (0, 1), (1, 0)]
    window.consumed(reader, file=0, upto_bytes=2 * CHUNK, ready_bytes=[2 * CHUNK, CHUNK])
    assert given_out(window) == [(1, 1), (1, 2)]


def test_who_comes_after_the_first_chunk_was_given_up_cannot_join():
    window = window_over(5, chunks=3)
    reader = window.join()
    given_out(window)
    assert window.may_join
    window.consumed(reader, file=0, upto_bytes=CHUNK, ready_bytes=[3 * CHUNK])
    given_out(window)

    assert not window.may_join


@pytest.mark.parametrize(("file", "upto"), [(0, 3 * CHUNK + 1), (1, 0), (0, CHUNK)])
def test_a_reader_that_claims_what_it_never_got_or_goes_back_is_refused(file, upto):
    window = window_over(5, chunks=3)
    reader = window.join()
    given_out(window)
    window.consumed(reader, file=0, upto_bytes=2 * CHUNK, ready_bytes=[3 * CHUNK])

    with pytest.raises(PeerError, match="reader"):
        window.consumed(reader, file=file, upto_bytes=upto, ready_bytes=[3 * CHUNK])


@given(
    total=st.integers(1, 400),
    step=st.integers(1, 20),
)
def test_a_window_fits_in_the_pool_and_holds_two_steps(total, step):
    chunks = window_chunks(total_chunks=total, step_chunks=step)

    assert chunks is None or 2 * step <= chunks <= total
    assert chunks is not None or 2 * step > total
    if step == 1 and chunks is not None:
        assert chunks <= max(2, min(WINDOW_CHUNKS, total // 2))
