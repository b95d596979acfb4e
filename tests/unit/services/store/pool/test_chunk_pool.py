"""Which chunks a checkpoint gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.pool.chunk_pool import ChunkPool


def test_chunks_whose_pages_are_there_go_first():
    pool = ChunkPool(8)
    pool.mark_faulted_in([4, 5, 6])

    assert pool.take(3) == (4, 5, 6)


def test_cold_chunks_fill_up_what_warm_ones_leave():
    pool = ChunkPool(6)
    pool.mark_faulted_in([4])

    assert pool.take(3) == (4, 0, 1)


def test_the_smallest_run_that_suffices_is_taken():
    """So that long runs stay for those who need them."""
    pool = ChunkPool(10)
    pool.mark_faulted_in(range(10))
    taken = pool.take(10)
    pool.give_back([*taken[:5], *taken[7:9]])

    assert pool.take(2) == (7, 8)


def test_scattered_chunks_do_when_no_run_is_long_enough():
    pool = ChunkPool(6)
    pool.mark_faulted_in(range(6))
    pool.take(6)
    pool.give_back([0, 2, 3, 5])

    assert pool.take(4) == (2, 3, 0, 5)


def test_giving_back_a_free_chunk_is_refused():
    pool = ChunkPool(2)

    with pytest.raises(ValueError, match="not taken"):
        pool.give_back([1])


def test_taking_more_than_is_free_is_refused():
    with pytest.raises(ValueError, match="3 chunks of 2"):
        ChunkPool(2).take(3)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60), st.sets(st.integers(0, 23)))
def test_no_chunk_is_ever_given_to_two(steps: list[tuple[bool, int]], warm: set[int]):
    pool = ChunkPool(24)
    pool.mark_faulted_in(warm)
    held: list[tuple[int, ...]] = []
    for give_back, count in steps:
        if give_back and held:
            pool.give_back(held.pop(0))
        elif count <= pool.free_count:
            held.append(pool.take(count))
        taken = [chunk for chunks in held for chunk in chunks]

        assert len(taken) == len(set(taken))
        assert len(taken) + pool.free_count == 24
