"""What every copy engine does: the same tests for the fake, here, and for CUDA's, where there is one."""

# ruff: noqa: D102 - a test's name is its claim

from __future__ import annotations

import itertools
import mmap
import os

import torch

from services.worker.weights.copy_engine import CopyEngine, Locked
from stoker.attach.memory import Access, MappedRange

BYTES = 40 * (1 << 20) + 123
"""More than two bounce buffers, and no whole number of anything."""


class SharedPages:
    """Shared memory, mapped read-only as a worker maps the store's arena."""

    def __init__(self, byte_count: int) -> None:
        descriptor = os.memfd_create("arena")
        try:
            pages = -(-byte_count // mmap.PAGESIZE) * mmap.PAGESIZE
            os.ftruncate(descriptor, pages)
            self.content = torch.randint(0, 256, (byte_count,), dtype=torch.uint8)
            os.pwrite(descriptor, self.content.numpy().tobytes(), 0)
            self.memory = MappedRange(pages)
            self.memory.map(0, descriptor, 0, pages, Access.read_only)
        finally:
            os.close(descriptor)

    def bytes(self, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Return mapped bytes as a tensor."""
        stop = self.content.numel() if end is None else end
        return torch.frombuffer(self.memory.view(start, stop - start), dtype=torch.uint8)


class CopyEngineSuite:
    """Subclass it with a fixture `engine` that gives a `CopyEngine`."""

    def test_what_is_copied_is_bit_identical(self, engine: CopyEngine) -> None:
        pages = SharedPages(BYTES)
        engine.lock(pages.memory.address, pages.memory.length)
        there = engine.allocate(BYTES)
        engine.copy(there, pages.bytes())
        engine.synchronize()

        assert torch.equal(there.cpu(), pages.content)

    def test_memory_that_is_not_locked_is_copied_all_the_same(self, engine: CopyEngine) -> None:
        pages = SharedPages(BYTES)
        there = engine.allocate(BYTES)
        engine.copy(there, pages.bytes())
        engine.synchronize()

        assert torch.equal(there.cpu(), pages.content)

    def test_pieces_come_to_their_places_in_any_sizes(self, engine: CopyEngine) -> None:
        pages = SharedPages(BYTES)
        engine.lock(pages.memory.address, pages.memory.length)
        there = engine.allocate(BYTES)
        ends = [0, 1, 4096, 4097, 20 << 20, BYTES]
        for start, end in itertools.pairwise(ends):
            engine.copy(there[start:end], pages.bytes(start, end))
        engine.synchronize()

        assert torch.equal(there.cpu(), pages.content)

    def test_what_joins_a_mark_sees_all_that_came_before_it(self, engine: CopyEngine) -> None:
        pages = SharedPages(BYTES)
        engine.lock(pages.memory.address, pages.memory.length)
        there = engine.allocate(BYTES)
        engine.copy(there, pages.bytes())
        mark = engine.mark()
        engine.join(mark)
        copied = there.clone()
        engine.synchronize()

        assert mark.is_passed()
        assert torch.equal(copied.cpu(), pages.content)

    def test_computing_takes_its_place_among_the_copies(self, engine: CopyEngine) -> None:
        pages = SharedPages(4096)
        there = engine.allocate(4096)
        other = engine.allocate(4096)
        engine.copy(there, pages.bytes())
        with engine.computing():
            other.copy_(there)
        engine.copy(there, torch.zeros(4096, dtype=torch.uint8))
        engine.synchronize()

        assert torch.equal(other.cpu(), pages.content)
        assert not there.any()

    def test_an_engine_can_be_closed_twice_and_nothing_stays_locked(self, engine: CopyEngine) -> None:
        pages = SharedPages(BYTES)
        first = engine.lock(pages.memory.address, pages.memory.length)
        engine.close()
        engine.close()

        assert engine.lock(pages.memory.address, pages.memory.length) is first

    def test_an_empty_range_is_not_locked(self, engine: CopyEngine) -> None:
        assert engine.lock(SharedPages(1).memory.address, 0) is Locked.NOT
