"""A window over a checkpoint that is larger than the pool: which of its reads may run now. Pure.

The chunks of all files, in their order, are numbered through; chunk *n* lies in ring slot *n* modulo the
window's size. So a chunk may be filled once the one that lay there before is needed no more: every reader
has copied it away, and what came from afar is on this host's disk. Rules:

1. Reads are given out in order, and only up to a window beyond the first chunk that is still needed.
2. A reader may join until the first chunk is given up; who comes later needs a window of its own.
3. A reader that leaves is waited for no more.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence

from services.store.catalog import CatalogEntry
from services.store.reading.read_queue import ChunkRead
from stoker.checkpoint.layout import chunk_count
from stoker.errors import PeerError

WINDOW_CHUNKS = 32
"""Twice what four threads read at a time (`read_plan.MAX_RUN_CHUNKS`): reading goes on beside copies."""


def window_chunks(*, total_chunks: int, step_chunks: int) -> int | None:
    """Return how many chunks a window has; None where the pool is too small for one.

    Args:
        total_chunks: Of the pool; a window takes half of it at most.
        step_chunks: That become ready together, because one digest covers them.
    """
    wanted = max(min(WINDOW_CHUNKS, total_chunks // 2), 2 * step_chunks, 1)
    return wanted if wanted <= total_chunks else None


def window_of(entry: CatalogEntry, total_chunks: int, chunk_bytes: int) -> Window | None:
    """Return a window on a checkpoint; None where the pool is too small for one."""
    index = entry.index
    digests = any(file.chunk_digests for file in index.files)
    step_chunks = math.lcm(index.chunk_bytes, chunk_bytes) // chunk_bytes if digests else 1
    chunks = window_chunks(total_chunks=total_chunks, step_chunks=step_chunks)
    sizes = [file.size_bytes for file in index.files]
    return None if chunks is None else Window(file_bytes=sizes, chunk_bytes=chunk_bytes, chunks=chunks)


class Window:
    """One checkpoint's way through; changed by the event loop only.

    Args:
        file_bytes: Sizes of its files, in order.
        chunk_bytes: Of a chunk.
        chunks: Of the window.
    """

    def __init__(self, *, file_bytes: Sequence[int], chunk_bytes: int, chunks: int) -> None:
        self.chunks = chunks
        self._chunk_bytes = chunk_bytes
        self._file_bytes = tuple(file_bytes)
        counts = [chunk_count(size, chunk_bytes) for size in file_bytes]
        self._first = list(itertools.accumulate(counts, initial=0))
        self._held_back: deque[ChunkRead] = deque()
        self._landing: dict[int, int] = {}
        self._consumed: dict[int, int] = {}
        self._readers = itertools.count(1)
        self._given_up = 0

    @property
    def bytes(self) -> int:
        """Bytes that are there at a time."""
        return self.chunks * self._chunk_bytes

    @property
    def total_chunks(self) -> int:
        """Chunks of the checkpoint."""
        return self._first[-1]

    @property
    def may_join(self) -> bool:
        """Tell whether a reader that comes now gets all of it."""
        return self._given_up == 0

    @property
    def all_given_out(self) -> bool:
        """Tell whether no read is held back."""
        return not self._held_back

    def ring(self, chunks: Sequence[int]) -> tuple[int, ...]:
        """Return the pool chunk of every chunk of the checkpoint."""
        return tuple(itertools.islice(itertools.cycle(chunks), self.total_chunks))

    def join(self) -> int:
        """Add a reader; returns its number."""
        reader = next(self._readers)
        self._consumed[reader] = 0
        return reader

    def leave(self, reader: int) -> None:
        """Wait for a reader no more."""
        self._consumed.pop(reader, None)

    def consumed(self, reader: int, *, file: int, upto_bytes: int, ready_bytes: Sequence[int]) -> None:
        """Note how far a reader is.

        Args:
            reader: Who.
            file: Which file.
            upto_bytes: Of it, from its start.
            ready_bytes: Of every file.

        Raises:
            PeerError: That is more than it was given, or less than before.
        """
        if file >= len(self._file_bytes) or upto_bytes > ready_bytes[file]:
            raise PeerError(f"a reader has used {upto_bytes} bytes of file {file}: so many never came")
        size = self._file_bytes[file]
        chunks = upto_bytes // self._chunk_bytes
        upto = self._first[file] + (chunk_count(size, self._chunk_bytes) if upto_bytes == size else chunks)
        if upto < self._consumed[reader]:
            raise PeerError(f"a reader went back to byte {upto_bytes} of file {file}, which is gone")
        self._consumed[reader] = upto

    def landing(self, read: ChunkRead) -> None:
        """Keep a read's chunks until they are on the disk."""
        self._landing[self._number(read)] = len(read.chunks)

    def landed(self, read: ChunkRead) -> None:
        """Keep them for that no more."""
        self._landing.pop(self._number(read), None)

    def hold_back(self, reads: Iterable[ChunkRead]) -> None:
        """Take all reads of the load, in the order of its files."""
        self._held_back.extend(reads)

    def drop(self) -> None:
        """Forget what is held back."""
        self._held_back.clear()

    def next_reads(self) -> list[ChunkRead]:
        """Give out the reads that may run now."""
        needed = [*self._consumed.values(), *self._landing]
        self._given_up = max(self._given_up, min(needed, default=0))
        upto = self._given_up + self.chunks
        given = []
        while self._held_back and self._end(self._held_back[0]) <= upto:
            given.append(self._held_back.popleft())
        return given

    def _number(self, read: ChunkRead) -> int:
        return self._first[read.file] + read.index

    def _end(self, read: ChunkRead) -> int:
        return self._number(read) + len(read.chunks)
