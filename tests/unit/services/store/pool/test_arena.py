"""The pool's memory."""

from __future__ import annotations

import threading

import pytest

from services.store.pool.arena import open_arena
from services.store.settings import FaultIn, StoreSettings
from stoker.errors import ConfigError
from stoker.units import KIB, MIB


def settings(**changes) -> StoreSettings:
    return StoreSettings(**({"pool_bytes": 4 * MIB, "chunk_bytes": 256 * KIB} | changes))


def test_a_pool_is_cut_into_whole_chunks():
    arena = open_arena(settings(pool_bytes=4 * MIB + 5))

    assert (arena.chunk_count, arena.total_bytes) == (16, 4 * MIB)
    arena.close()


def test_chunks_do_not_overlap():
    arena = open_arena(settings())
    for number in range(arena.chunk_count):
        arena.chunk(number)[:] = bytes([number]) * arena.chunk_bytes

    assert all(set(arena.chunk(number)) == {number} for number in range(arena.chunk_count))
    arena.close()


def test_every_chunk_is_faulted_in_once():
    arena = open_arena(settings())
    seen: list[int] = []
    finished = threading.Event()
    results = []

    def done(faulted_in):
        results.append(faulted_in)
        finished.set()

    arena.fault_in(3, step_done=seen.extend, done=done)

    assert finished.wait(30)
    assert sorted(seen) == list(range(arena.chunk_count))
    assert results[0].byte_count == arena.total_bytes
    assert results[0].page_bytes == arena.page_bytes
    arena.close()


def test_a_pool_larger_than_memory_is_refused_at_the_start():
    with pytest.raises(ConfigError, match="STOKER_STORE_POOL_BYTES asks for"):
        open_arena(settings(pool_bytes=1 << 50))


def test_a_pool_smaller_than_a_chunk_is_refused():
    with pytest.raises(ConfigError, match="no room for one chunk"):
        open_arena(settings(pool_bytes=1000, fault_in=FaultIn.LAZY))
