"""The store's pool, page-locked before there is a checkpoint in it."""

from __future__ import annotations

import mmap
import os

import pytest
import torch

from services.worker.weights import pool_lock
from services.worker.weights.copy_engine import Locked
from services.worker.weights.pool_lock import LockedPool, lock_pool
from stoker.attach.pool import Pool
from stoker.errors import PeerError
from tests.copy_engines.fake import FakeCopyEngine

PAGE = mmap.PAGESIZE


class Attached:
    """An attachment whose file lies backwards in the arena, page by page."""

    def __init__(self, arena: tuple[int, int], pages: int) -> None:
        self.arena = arena
        self._pages = pages

    def places(self, _file: int, start: int, end: int) -> list[tuple[int, int]]:
        """As `Attachment.places`."""
        found = []
        while start < end:
            inside = start % PAGE
            length = min(PAGE - inside, end - start)
            found.append(((self._pages - 1 - start // PAGE) * PAGE + inside, length))
            start += length
        return found


@pytest.fixture
def arena():
    descriptor = os.memfd_create("arena")
    os.ftruncate(descriptor, 4 * PAGE)
    os.pwrite(descriptor, os.urandom(4 * PAGE), 0)
    yield descriptor
    os.close(descriptor)


def test_the_whole_pool_is_locked_once(arena) -> None:
    engine = FakeCopyEngine()
    pool = Pool(arena, 4 * PAGE)

    locked = LockedPool(pool, engine)

    assert locked.locked is Locked.WHOLE
    assert engine.locked == [pool.memory.address]
    assert locked.ranges == ((pool.memory.address, pool.memory.address + 4 * PAGE),)


def test_a_pool_that_the_driver_takes_in_segments_only_is_one_range_for_copies(arena) -> None:
    engine = FakeCopyEngine(longest_lock_bytes=PAGE, segment_bytes=PAGE)

    locked = LockedPool(Pool(arena, 4 * PAGE), engine)

    assert locked.locked is Locked.SEGMENTS
    assert len(engine.locked) == 4
    assert len(locked.ranges) == 1


def test_a_files_bytes_come_from_locked_memory_in_the_files_order(arena) -> None:
    locked = LockedPool(Pool(arena, 4 * PAGE), FakeCopyEngine())
    status = os.fstat(arena)
    attached = Attached((status.st_dev, status.st_ino), 4)
    ((first, last),) = locked.ranges

    sources = locked.sources(attached, 0, 100, 3 * PAGE + 7)

    content = os.pread(arena, 4 * PAGE, 0)
    file = b"".join(content[at : at + PAGE] for at in range(3 * PAGE, -1, -PAGE))
    assert bytes(torch.cat(sources).numpy()) == file[100 : 3 * PAGE + 7]
    assert all(
        first <= source.data_ptr() and source.data_ptr() + source.numel() <= last for source in sources
    )


def test_a_store_that_was_started_anew_is_copied_from_as_it_is_mapped(arena) -> None:
    locked = LockedPool(Pool(arena, 4 * PAGE), FakeCopyEngine())

    assert locked.sources(Attached((0, 0), 4), 0, 0, PAGE) is None


def test_a_driver_that_refuses_leaves_loads_to_the_buffers(arena, monkeypatch) -> None:
    monkeypatch.setattr(pool_lock, "map_pool", lambda _socket: Pool(arena, 4 * PAGE))

    assert lock_pool("socket", FakeCopyEngine(longest_lock_bytes=0)) is None
    assert lock_pool("socket", FakeCopyEngine()) is not None


def test_a_worker_whose_store_is_not_there_becomes_warm_without_it(monkeypatch) -> None:
    def nobody(_socket):
        raise PeerError("no checkpoint store answers")

    monkeypatch.setattr(pool_lock, "map_pool", nobody)

    assert lock_pool("socket", FakeCopyEngine()) is None
