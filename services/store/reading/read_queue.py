"""Which chunk is read next, and the threads that read.

Order: loads that someone waits for go before prefetches; loads of one priority take turns, chunk by chunk, so
that they share the disk; within a load the chunks come in the order they were given. `ReadOrder` decides and
is pure; `Readers` runs it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from services.store.reading.chunk_source import ChunkSource, fill_run
from stoker.checkpoint.reading import ReadPart
from stoker.errors import LoadFailed, StokerError


class Urgency(IntEnum):
    """Who waits; lower goes first."""

    DEMAND = 0
    PREFETCH = 1


class Job(Protocol):
    """Something that is done to chunks of a load in a thread."""

    @property
    def load(self) -> int:
        """Which load it belongs to."""

    @property
    def length(self) -> int:
        """Bytes it moves."""

    @property
    def name(self) -> str:
        """For people: what is read or written."""

    def run(self) -> list[ReadPart]:
        """Do it; blocks. Raises StokerError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRead:
    """Neighbouring chunks of a file to be read from one source: one, but for digests that cover several.

    Attributes:
        load: Which load it belongs to.
        file: Index of the file in the checkpoint.
        index: The first chunk, counted in the file.
        source: Where the bytes come from.
        chunks: Where they go: chunks of the arena, all of one size.
        length: Bytes wanted; the last chunk of a file may be filled in part.
    """

    load: int
    file: int
    index: int
    source: ChunkSource
    chunks: tuple[memoryview, ...]
    length: int

    @property
    def offset(self) -> int:
        """First byte in the file."""
        return self.index * len(self.chunks[0])

    @property
    def name(self) -> str:
        """See `Job`."""
        return self.source.name

    def run(self) -> list[ReadPart]:
        """See `Job`."""
        return fill_run(self.source, self.chunks, offset=self.offset, length=self.length)


def shortened(read: ChunkRead, most: int) -> list[ChunkRead]:
    """Return reads of at most so many chunks, ≥ 1, that bring the same bytes in the same order."""
    step_bytes = most * len(read.chunks[0])
    return [
        replace(
            read,
            index=read.index + first,
            chunks=read.chunks[first : first + most],
            length=min(step_bytes, read.length - first * len(read.chunks[0])),
        )
        for first in range(0, len(read.chunks), most)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLanding:
    """Chunks that arrived from outside the host and go to its disk.

    Attributes:
        read: What brought them.
        land: Writes the chunks, given the offset in the file and the bytes; blocks.
    """

    read: ChunkRead
    land: Callable[[Sequence[memoryview], int, int], None]

    @property
    def load(self) -> int:
        """See `Job`."""
        return self.read.load

    @property
    def length(self) -> int:
        """See `Job`."""
        return self.read.length

    @property
    def name(self) -> str:
        """See `Job`."""
        return f"the disk's copy of {self.read.name}"

    def run(self) -> list[ReadPart]:
        """See `Job`."""
        self.land(self.read.chunks, self.read.offset, self.read.length)
        return []


JobT = TypeVar("JobT", bound=Job)


class ReadOrder(Generic[JobT]):
    """The reads that wait, in order; not thread safe."""

    def __init__(self) -> None:
        self._waiting: dict[Urgency, deque[int]] = {urgency: deque() for urgency in Urgency}
        self._reads: dict[int, deque[JobT]] = {}

    def add(self, load: int, reads: Iterable[JobT], urgency: Urgency) -> None:
        """Queue reads of a load, after those of it that wait."""
        waiting = self._reads.get(load)
        if waiting:
            waiting.extend(reads)
            return
        self._reads[load] = deque(reads)
        if load not in self._waiting[urgency]:
            self._waiting[urgency].append(load)

    def next(self) -> JobT | None:
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

    def change(self, load: int, changed: Callable[[JobT], Sequence[JobT]]) -> int:
        """Put other reads in the place of each of a load that waits; returns how many more there are now."""
        reads = self._reads.get(load, deque())
        before = len(reads)
        reads.extend([found for read in reads for found in changed(read)])
        for _ in range(before):
            reads.popleft()
        return len(reads) - before

    def drop(self, load: int) -> int:
        """Forget what is left of a load; returns how many reads that was."""
        return len(self._reads.pop(load, ()))

    def waiting_bytes(self) -> int:
        """Return the bytes of all reads that wait."""
        return sum(read.length for reads in self._reads.values() for read in reads)


Outcome = list[ReadPart] | StokerError


class Readers(Generic[JobT]):
    """Threads that read chunks in the queue's order.

    A thread waits for a token: there is one for each read that was queued, so each read wakes one thread. A
    token whose read was dropped meanwhile wakes a thread for nothing.
    """

    def __init__(self, threads: int, done: Callable[[JobT, Outcome], None], *, name: str = "read") -> None:
        """Start the threads.

        Args:
            threads: How many.
            done: Called from a reader thread after each read.
            name: Of the threads.
        """
        self._done = done
        self._order: ReadOrder[JobT] = ReadOrder()
        self._lock = threading.Lock()
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, load: int, reads: Iterable[JobT], urgency: Urgency) -> None:
        """Queue a load's reads."""
        found = list(reads)
        with self._lock:
            self._order.add(load, found, urgency)
        for _ in found:
            self._tokens.put(None)

    def hurry(self, load: int) -> None:
        """Make a prefetch urgent."""
        with self._lock:
            self._order.hurry(load)

    def change(self, load: int, changed: Callable[[JobT], Sequence[JobT]]) -> int:
        """Put other reads, at least one, in the place of each that waits; returns how many more there are."""
        with self._lock:
            more = self._order.change(load, changed)
        for _ in range(more):
            self._tokens.put(None)
        return more

    def drop(self, load: int) -> int:
        """Forget what is left of a load; returns how many reads will never happen. Running ones go on."""
        with self._lock:
            return self._order.drop(load)

    def waiting_bytes(self) -> int:
        """Return the bytes of all reads that wait."""
        with self._lock:
            return self._order.waiting_bytes()

    def close(self, *, grace_seconds: float) -> None:
        """Let running reads end, start no new one; a disk that hangs is not waited for longer than that."""
        self._stopped = True
        for _ in self._threads:
            self._tokens.put(None)
        for thread in self._threads:
            thread.join(grace_seconds)

    def _run(self) -> None:
        while (read := self._take()) is not None:
            self._done(read, _outcome(read))

    def _take(self) -> JobT | None:
        while True:
            self._tokens.get()
            with self._lock:
                if self._stopped:
                    return None
                read = self._order.next()
            if read is not None:
                return read


def _outcome(job: Job) -> Outcome:
    try:
        return job.run()
    except StokerError as error:
        return error
    except Exception as error:  # noqa: BLE001 - the boundary of the thread: a load fails, the daemon goes on
        return LoadFailed(f"{job.name}: {type(error).__name__}: {error}")
