"""Measures the disk before the first load does, so that the first start is not predicted by a guess.

Rules:
1. One measurement in the daemon's life, of the first checkpoint on this host that is large enough: one found
   when the daemon starts, or the first that is described (a deployment). Nothing is written to have one.
2. It reads as loads do: as many at a time, direct where the page cache has nothing, held to the same pace.
   What the page cache gave is read past it, too, so that both rates are known.
3. It never competes: it does not begin while anything loads, and gives up when a load begins. What was read
   beside a load counts for nothing; that load measures the disk itself.
4. What it read goes nowhere: into memory of its own, no chunk of the pool, no digest, no count of reads.
"""

from __future__ import annotations

import asyncio
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from services.store.catalog import CatalogEntry
from services.store.loads import Loads
from services.store.reading.bandwidth import moved_by_tier
from services.store.reading.chunk_source import ChunkSource
from services.store.reading.pace import Pace
from services.store.records import record_probed
from stoker import log
from stoker.checkpoint.index import CheckpointFile
from stoker.checkpoint.reading import DISK, ReadPart, SourceFile
from stoker.errors import LoadFailed
from stoker.units import MIB

READ_BYTES = 4 * MIB
"""Of one read: enough to be at the disk's rate, little enough that a load never waits for long behind it."""
LEAST_BYTES = 4 * MIB
"""Of a tier: less says more about its latency than about its rate."""
LIMIT_SECONDS = 0.2
"""After which no further read of a pass begins: one pass as loads read, one past the page cache."""
MAX_TRIES = 4
"""Checkpoints that are tried when their disk gave nothing (a file system in memory, a file that is gone)."""
_GRACE_SECONDS = 2.0
"""A disk that hangs is not waited for longer than that when the daemon ends."""

_MEMORY_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE

Hold = Callable[[Sequence[ReadPart]], list[ReadPart]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """One pass over a file, shared by the threads that read it.

    Attributes:
        source: The file.
        offsets: Of the reads; an iterator made in C, whose `next` is atomic.
        size_bytes: Of the file.
        until_seconds: No read but each thread's first begins later, in monotonic seconds: on a busy host a
            thread may get its turn late.
        stop: Set from outside: read no more, and count nothing that ends from now on.
        hold: Holds reads back to the tiers' paces.
    """

    source: ChunkSource
    offsets: Iterator[int]
    size_bytes: int
    until_seconds: float
    stop: threading.Event
    hold: Hold

    def run(self, now: Callable[[], float] = time.monotonic) -> list[ReadPart]:
        """Read until all is read or the time is over; blocks. Returns what came, and when.

        All reads go into the same memory, one over the other; its pages are there before the first.

        Args:
            now: Monotonic seconds.

        Raises:
            LoadFailed: As `ChunkSource.read`.
        """
        memory = memoryview(mmap.mmap(-1, READ_BYTES, flags=_MEMORY_FLAGS))
        parts: list[ReadPart] = []
        while not self.stop.is_set() and (not parts or now() < self.until_seconds):
            offset = next(self.offsets, None)
            if offset is None:
                break
            length = min(len(memory), self.size_bytes - offset)
            read = self.hold(self.source.read(memory, offset=offset, length=length))
            if self.stop.is_set():
                break
            parts += read
        return parts


def telling(parts: Sequence[ReadPart]) -> list[ReadPart]:
    """Return the parts of the tiers that gave enough to tell a rate, in the order in which they ended."""
    enough = {
        moved.tier for moved in moved_by_tier(parts) if moved.byte_count >= LEAST_BYTES and moved.seconds > 0
    }
    return sorted((part for part in parts if part.tier in enough), key=lambda part: part.ended_seconds)


def file_to_probe(entry: CatalogEntry) -> CheckpointFile | None:
    """Return a checkpoint's largest file; None where that is too small, or not on this host."""
    if entry.far is not None and not entry.far.whole:
        return None
    largest = max(entry.index.files, key=lambda file: file.size_bytes, default=None)
    return largest if largest is not None and largest.size_bytes >= LEAST_BYTES else None


class DiskProbe:
    """The one measurement of a daemon; used from the event loop only."""

    def __init__(self, loads: Loads, pace: Pace, *, byte_count: int, threads: int) -> None:
        """Take what it needs.

        Args:
            loads: Whose rates it seeds, and for which it makes way.
            pace: Of the loads.
            byte_count: What one pass reads at most; 0 = never probe.
            threads: That read at a time.
        """
        self._loads = loads
        self._hold = pace.hold
        self._byte_count = byte_count
        self._threads = threads
        self._stop = threading.Event()
        self._tries_left = MAX_TRIES if byte_count else 0
        self._task: asyncio.Task[None] | None = None

    def consider(self, entry: CatalogEntry) -> None:
        """Probe the disk of this checkpoint in the background, if the disk's rate is unknown so far."""
        if self._tries_left == 0 or (self._task is not None and not self._task.done()):
            return
        if self._loads.loading() or self._loads.transfers.rates.bytes_per_second(DISK) is not None:
            return
        file = file_to_probe(entry)
        if file is not None and file.name in entry.signatures:
            self._tries_left -= 1
            self._task = asyncio.create_task(self._probe(entry, file), name="disk-probe")
            self._task.add_done_callback(_record_crash)

    @property
    def running(self) -> asyncio.Task[None] | None:
        """The last probe, which may have ended; None = there was none."""
        return self._task

    async def close(self) -> None:
        """Give up and wait for the reads that are under way; call when the pace is closed."""
        self._tries_left = 0
        self._stop.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_GRACE_SECONDS)

    async def _probe(self, entry: CatalogEntry, file: CheckpointFile) -> None:
        if self._loads.loading():
            self._stop.set()
        watching = asyncio.create_task(self._stop_for_a_load(), name="disk-probe-watch")
        parts: list[ReadPart] = []
        error = ""
        try:
            parts += await self._pass(entry, file, past_cache=False)
            if not self._stop.is_set() and all(part.tier != DISK for part in parts):
                parts += await self._pass(entry, file, past_cache=True)
        except LoadFailed as failed:
            error = failed.message
        finally:
            watching.cancel()
        gave_way = self._stop.is_set()
        found = telling(parts)
        if gave_way or any(part.tier == DISK for part in found):
            self._tries_left = 0
        if found:
            self._loads.learn(found)
        record_probed(entry, moved_by_tier(found), gave_way=gave_way, error=error)

    async def _stop_for_a_load(self) -> None:
        with self._loads.changes.watched() as changed:
            while not self._loads.loading():
                await changed.wait()
                changed.clear()
        self._stop.set()

    async def _pass(self, entry: CatalogEntry, file: CheckpointFile, *, past_cache: bool) -> list[ReadPart]:
        """Return what one pass over a file's beginning gave."""
        source = SourceFile(file.path, entry.signatures[file.name], past_cache=past_cache)
        read_bytes = min(file.size_bytes, self._byte_count)
        threads = min(self._threads, -(-read_bytes // READ_BYTES))
        sweep = Sweep(
            source=source,
            offsets=iter(range(0, read_bytes, READ_BYTES)),
            size_bytes=file.size_bytes,
            until_seconds=time.monotonic() + LIMIT_SECONDS,
            stop=self._stop,
            hold=self._hold,
        )
        executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="probe")
        loop = asyncio.get_running_loop()
        sweeps = [loop.run_in_executor(executor, sweep.run) for _ in range(threads)]
        try:
            await asyncio.wait(sweeps)
        finally:
            executor.shutdown(wait=False)
            source.close()
        return [part for ended in sweeps for part in ended.result()]


def _record_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.get().error("disk.probe_crashed", exc_info=task.exception())
