"""Chunks on their way: from threads back to the event loop, into ready counters, on to the host's disk.

Each job that ends comes back as a call on the loop. A read moves the ready counter of its file and, where it
came from afar, queues the landing of its chunks. Landings hold the chunks as reads do (`landings_left`), but
nobody waits for them: a load is done when its reads are.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterable, Mapping, Sequence

from services.store.pool.counters import ReadyCounters
from services.store.pool.resident import Phase, Resident
from services.store.reading.bandwidth import RunningRates
from services.store.reading.lanes import Job, Lane, Lanes
from services.store.reading.pace import Pace
from services.store.reading.read_plan import ReadingDisk, run_chunks
from services.store.reading.read_queue import ChunkLanding, ChunkRead, Outcome, Urgency, shortened
from stoker.checkpoint.reading import DISK, ReadPart
from stoker.errors import StokerError


class Transfers:
    """All that moves; used from the event loop only."""

    def __init__(  # noqa: PLR0913 - the parts it joins
        self,
        threads: Mapping[Lane, int],
        counters: ReadyCounters,
        *,
        arrived: Callable[[Resident, ChunkRead], None],
        failed: Callable[[Resident, StokerError], None],
        ended: Callable[[Resident], None],
        pace: Pace,
    ) -> None:
        """Start the threads; call inside the running loop.

        Args:
            threads: How many per lane.
            counters: Of the files' ready bytes.
            arrived: Called when a read has filled its chunks, before `ended`.
            failed: Called when a read failed, before `ended`.
            ended: Called after every job of a resident.
            pace: Holds reads back; closed with this.
        """
        self.rates = RunningRates()
        self._counters = counters
        self._told_arrived = arrived
        self._failed = failed
        self._ended = ended
        self._pace = pace
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # threads have none: log lines would lose theirs
        self._disk_threads = threads[Lane.DISK]
        self._lanes = Lanes(threads, self._done)
        self._residents: dict[int, Resident] = {}

    def begin(self, resident: Resident, reads: Iterable[ChunkRead]) -> None:
        """Queue a load's reads, each in the lane of its file."""
        self._residents[resident.key] = resident
        self._queue(resident, reads)

    def go_on(self, resident: Resident) -> None:
        """Queue the reads of a window that may run by now."""
        if resident.window is not None:
            self._queue(resident, resident.window.next_reads())

    def hurry(self, resident: Resident) -> None:
        """Make a prefetch urgent."""
        self._lanes.hurry(resident.key)

    def disk(self) -> ReadingDisk:
        """Return how files on this host's disks are read."""
        return ReadingDisk(bytes_per_second=self.rates.bytes_per_second(DISK), threads=self._disk_threads)

    def shorten(self, resident: Resident, *, chunk_bytes: int) -> None:
        """Cut what is queued from disk into reads that suit how the resident is used by now.

        Chunks that one digest covers stay in one read.
        """
        most = run_chunks(resident, chunk_bytes=chunk_bytes, disk=self.disk())

        def cut(job: Job) -> Sequence[Job]:
            if isinstance(job, ChunkRead) and resident.files[job.file].together == 1:
                return shortened(job, most)
            return (job,)

        resident.reads_left += self._lanes.change(Lane.DISK, resident.key, cut)

    def abandon(self, resident: Resident) -> None:
        """Forget what is queued for a resident; what runs goes on and still ends."""
        resident.reads_left -= self._lanes.drop_reads(resident.key)
        resident.landings_left -= self._lanes.drop_landings(resident.key)

    def forget(self, resident: Resident) -> None:
        """Let go of a resident of which nothing is queued and nothing runs."""
        self._residents.pop(resident.key, None)

    def waiting_bytes(self, lane: Lane) -> int:
        """Return the bytes queued in a lane."""
        return self._lanes.waiting_bytes(lane)

    async def close(self, *, grace_seconds: float) -> None:
        """End the threads."""
        self._pace.close()
        await asyncio.to_thread(self._lanes.close, grace_seconds=grace_seconds)

    def _queue(self, resident: Resident, reads: Iterable[ChunkRead]) -> None:
        by_lane: dict[Lane, list[ChunkRead]] = {}
        for read in reads:
            by_lane.setdefault(resident.files[read.file].lane, []).append(read)
        resident.reads_left += sum(map(len, by_lane.values()))
        for lane, found in by_lane.items():
            self._lanes.add(lane, resident.key, found, resident.urgency)

    def _done(self, job: Job, outcome: Outcome) -> None:
        """Called from a thread."""
        if not isinstance(outcome, StokerError):
            outcome = self._pace.hold(outcome)
        try:
            self._loop.call_soon_threadsafe(self._take, job, outcome, context=self._context)
        except RuntimeError:
            return  # the loop is closed: the process is ending

    def _take(self, job: Job, outcome: Outcome) -> None:
        resident = self._residents[job.load]
        if isinstance(job, ChunkLanding):
            resident.landings_left -= 1
            if resident.window is not None:
                resident.window.landed(job.read)
        else:
            resident.reads_left -= 1
            if isinstance(outcome, StokerError):
                self._failed(resident, outcome)
            elif resident.phase is Phase.LOADING:
                self._arrived(resident, job, outcome)
        self._ended(resident)

    def _arrived(self, resident: Resident, read: ChunkRead, parts: list[ReadPart]) -> None:
        resident.parts += parts
        self.rates.add(parts)
        file = resident.files[read.file]
        self._told_arrived(resident, read)
        further = [file.arrive(read.index + number) for number in range(len(read.chunks))]
        if any(further):
            self._counters.set(file.slot, file.ready_bytes)
            resident.changes.tell()
        if file.land is not None:
            resident.landings_left += 1
            if resident.window is not None:
                resident.window.landing(read)
            landing = ChunkLanding(read=read, land=file.land)
            self._lanes.add(Lane.LANDING, resident.key, [landing], Urgency.DEMAND)
