"""Which chunk is read next, and the threads that read.

Order: loads that someone waits for go before prefetches; loads of one priority take turns, chunk by chunk, so
that they share the disk; within a load the chunks come in the order they were given. `ReadOrder` decides and
is pure; `Readers` runs it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

from services.store.chunk_source import ChunkSource
from stoker.checkpoint.reading import ReadPart
from stoker.errors import LoadFailed, StokerError


class Urgency(IntEnum):
    """Who waits; lower goes first."""

    DEMAND = 0
    PREFETCH = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRead:
    """One chunk to be read.

    Attributes:
        load: Which load it belongs to.
        file: Index of the file in the checkpoint.
        index: Which chunk of the file.
        source: Where its bytes come from.
        chunk: Where the bytes go: a chunk of the arena.
        length: Bytes wanted; less than a chunk at the end of a file.
    """

    load: int
    file: int
    index: int
    source: ChunkSource
    chunk: memoryview
    length: int

    @property
    def offset(self) -> int:
        """First byte in the file."""
        return self.index * len(self.chunk)


class ReadOrder:
    """The reads that wait, in order; not thread safe."""

    def __init__(self) -> None:
        self._waiting: dict[Urgency, deque[int]] = {urgency: deque() for urgency in Urgency}
        self._reads: dict[int, deque[ChunkRead]] = {}

    def add(self, load: int, reads: Iterable[ChunkRead], urgency: Urgency) -> None:
        """Queue a load's reads."""
        self._reads[load] = deque(reads)
        self._waiting[urgency].append(load)

    def next(self) -> ChunkRead | None:
        """Take the next read, or None when none waits."""
        for waiting in self._waiting.values():
            while waiting:
                load = waiting.popleft()
                reads = self._reads.get(load)
                if not reads:
                    self._reads.pop(load, None)
                    continue
                waiting.append(load)
                return reads.popleft()
        return None

    def hurry(self, load: int) -> None:
        """Make a prefetch urgent: someone waits for it now."""
        if load in self._waiting[Urgency.PREFETCH]:
            self._waiting[Urgency.PREFETCH].remove(load)
            self._waiting[Urgency.DEMAND].append(load)

    def drop(self, load: int) -> int:
        """Forget what is left of a load; returns how many reads that was."""
        return len(self._reads.pop(load, ()))

    def waiting_bytes(self) -> int:
        """Return the bytes of all reads that wait."""
        return sum(read.length for reads in self._reads.values() for read in reads)


Outcome = list[ReadPart] | StokerError


class Readers:
    """Threads that read chunks in the queue's order."""

    def __init__(self, threads: int, done: Callable[[ChunkRead, Outcome], None]) -> None:
        """Start the threads.

        Args:
            threads: How many.
            done: Called from a reader thread after each read.
        """
        self._done = done
        self._order = ReadOrder()
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._run, name=f"read-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, load: int, reads: Iterable[ChunkRead], urgency: Urgency) -> None:
        """Queue a load's reads."""
        with self._changed:
            self._order.add(load, reads, urgency)
            self._changed.notify_all()

    def hurry(self, load: int) -> None:
        """Make a prefetch urgent."""
        with self._changed:
            self._order.hurry(load)

    def drop(self, load: int) -> int:
        """Forget what is left of a load; returns how many reads will never happen. Running ones go on."""
        with self._changed:
            return self._order.drop(load)

    def waiting_bytes(self) -> int:
        """Return the bytes of all reads that wait."""
        with self._changed:
            return self._order.waiting_bytes()

    def close(self, *, grace_seconds: float) -> None:
        """Let running reads end, start no new one; a disk that hangs is not waited for longer than that."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(grace_seconds)

    def _run(self) -> None:
        while (read := self._take()) is not None:
            self._done(read, _outcome(read))

    def _take(self) -> ChunkRead | None:
        with self._changed:
            while not self._stopped:
                read = self._order.next()
                if read is not None:
                    return read
                self._changed.wait()
        return None


def _outcome(read: ChunkRead) -> Outcome:
    try:
        return read.source.read(read.chunk, offset=read.offset, length=read.length)
    except StokerError as error:
        return error
    except Exception as error:  # noqa: BLE001 - the boundary of the thread: a load fails, the daemon goes on
        return LoadFailed(f"{read.source.name}: {type(error).__name__}: {error}")
