"""From a checkpoint and the chunks it was given to the reads that fill them, in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.store.catalog import CatalogEntry
from services.store.far_weights import OpenedFile
from services.store.pool.arena import Arena
from services.store.pool.resident import Resident, ResidentFile
from services.store.reading.disk_sources import DiskSources
from services.store.reading.lanes import Lane
from services.store.reading.read_queue import ChunkRead, Urgency
from stoker.checkpoint.index import CheckpointFile
from stoker.checkpoint.layout import chunk_count

MAX_RUN_CHUNKS = 4
"""Beyond 64 MiB a read gains nothing: see `fill_chunks`."""

FIRST_CHUNKS = 2
"""Of a load that is used in order: read one by one, so that the first layers are there early."""

AHEAD_SECONDS = {Urgency.DEMAND: 0.25, Urgency.PREFETCH: 0.125}
"""What another urgent load may have to wait for a load's reads that run already, by that load's urgency.

Loads that somebody waits for share the disk in any case. Longer reads take less of the processor: 0.31 GB
are 11.5 ms of the daemon's in 16 reads and 8.2 ms in 7."""

AHEAD_SHARE = 1 / 8
"""Of a load that is used in order: what is on its way at a time. Reads that run side by side end together, so
a forward pass that follows them waits for its next layer for up to this share of the load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingDisk:
    """How files on disk are read.

    Attributes:
        bytes_per_second: Of the disk; None when that was not learnt yet.
        threads: That read from it.
    """

    bytes_per_second: float | None
    threads: int


def chunks_per_read(
    disk: ReadingDisk,
    *,
    chunk_bytes: int,
    followed_bytes: int | None = None,
    urgency: Urgency = Urgency.DEMAND,
    window_chunks: int | None = None,
) -> int:
    """Return how many chunks of a file on disk are read in one go.

    Larger reads take less of the processor; reads that run already hold an urgent one up. So as many as the
    disk is known to bring within `AHEAD_SECONDS`, and of a load that is used in order at most `AHEAD_SHARE`,
    in all threads together.

    Args:
        disk: Where the files are.
        chunk_bytes: Of one.
        followed_bytes: Of all files, where the load is used in order; None = it is not.
        urgency: Of the load.
        window_chunks: Of the window that they are read into: each thread gets a part of it.
    """
    if disk.bytes_per_second is None:
        return 1
    threads = disk.threads
    most = MAX_RUN_CHUNKS if window_chunks is None else min(MAX_RUN_CHUNKS, window_chunks // (2 * threads))
    ahead_bytes = disk.bytes_per_second * AHEAD_SECONDS[urgency]
    if followed_bytes is not None:
        ahead_bytes = min(ahead_bytes, followed_bytes * AHEAD_SHARE)
    return max(1, min(most, int(ahead_bytes / (threads * chunk_bytes))))


def run_chunks(resident: Resident, *, chunk_bytes: int, disk: ReadingDisk) -> int:
    """Return how many chunks of a resident's files on disk are read in one go, as it is used by now."""
    window = resident.window
    return chunks_per_read(
        disk,
        chunk_bytes=chunk_bytes,
        followed_bytes=resident.entry.index.weight_bytes if resident.used_in_order else None,
        urgency=resident.urgency,
        window_chunks=None if window is None else window.chunks,
    )


def chunks_needed(entry: CatalogEntry, chunk_bytes: int) -> int:
    """Return how many chunks a checkpoint takes; each file starts a new one."""
    return sum(chunk_count(file.size_bytes, chunk_bytes) for file in entry.index.files)


def lay_out_and_plan(  # noqa: PLR0913 - what a load is made of
    resident: Resident,
    *,
    chunks: Sequence[int],
    slots: Sequence[int],
    arena: Arena,
    sources: DiskSources,
    disk: ReadingDisk,
) -> list[ChunkRead]:
    """Give a resident its files in these chunks; return the reads that may run now, in order.

    Args:
        resident: Has no files yet; its window, if it has one, holds the other reads back.
        chunks: As many as it needs.
        slots: A ready counter for each file.
        arena: Has the chunks.
        sources: Open files on disk.
        disk: How they are read.
    """
    window = resident.window
    resident.files = lay_out(
        resident.entry,
        chunks=chunks if window is None else window.ring(chunks),
        slots=slots,
        chunk_bytes=arena.chunk_bytes,
        sources=sources,
    )
    reads = plan_reads(
        resident.files,
        load=resident.key,
        ranks=resident.entry.index.layout == "converted" and window is None,
        memory=arena.chunk,
        per_read=run_chunks(resident, chunk_bytes=arena.chunk_bytes, disk=disk),
        in_order=resident.used_in_order or window is not None,
    )
    if window is None:
        return reads
    window.hold_back(reads)
    return window.next_reads()


def lay_out(
    entry: CatalogEntry,
    *,
    chunks: Sequence[int],
    slots: Sequence[int],
    chunk_bytes: int,
    sources: DiskSources,
) -> tuple[ResidentFile, ...]:
    """Deal chunks, counter slots and sources out to a checkpoint's files, in their order."""
    taken = iter(chunks)
    files = []
    for file, slot in zip(entry.index.files, slots, strict=True):
        opened = _open(entry, file, sources, chunk_bytes)
        files.append(
            ResidentFile(
                size_bytes=file.size_bytes,
                chunk_bytes=chunk_bytes,
                chunks=tuple(itertools.islice(taken, chunk_count(file.size_bytes, chunk_bytes))),
                slot=slot,
                source=opened.source,
                lane=opened.lane,
                together=opened.together,
                step_bytes=opened.step_bytes,
                land=opened.land,
            )
        )
    return tuple(files)


def _open(entry: CatalogEntry, file: CheckpointFile, sources: DiskSources, chunk_bytes: int) -> OpenedFile:
    if entry.far is None:
        return OpenedFile(source=sources.open(entry, file), step_bytes=sources.step_bytes(entry, file))
    return entry.far.open(file, lambda file: sources.open(entry, file), chunk_bytes=chunk_bytes)


def plan_reads(  # noqa: PLR0913 - what a load is made of
    files: Sequence[ResidentFile],
    *,
    load: int,
    ranks: bool,
    memory: Callable[[int], memoryview],
    per_read: int = 1,
    in_order: bool = False,
) -> list[ChunkRead]:
    """Return a load's reads in order.

    Args:
        files: Laid out.
        load: Its key.
        ranks: Files are ranks that are used side by side, so their chunks take turns; otherwise they are
            shards that are used one after the other.
        memory: Gives the memory of a chunk.
        per_read: Chunks of a file on disk that are read in one go.
        in_order: The load is used in order, as it comes.
    """
    first_chunks = FIRST_CHUNKS if in_order else 0
    by_file = [
        [
            ChunkRead(
                load=load,
                file=number,
                index=index,
                source=file.source,
                chunks=tuple(memory(chunk) for chunk in file.chunks[index:end]),
                length=min(end * file.chunk_bytes, file.size_bytes) - index * file.chunk_bytes,
            )
            for index, end in _steps(file, per_read, first_chunks)
        ]
        for number, file in enumerate(files)
        if file.source is not None
    ]
    if ranks:
        return [read for turn in itertools.zip_longest(*by_file) for read in turn if read is not None]
    return [read for reads in by_file for read in reads]


def _steps(file: ResidentFile, per_read: int, first_chunks: int) -> list[tuple[int, int]]:
    """Return the first chunk of each read of a file, and one past its last."""
    count = len(file.chunks)
    if file.lane is not Lane.DISK or file.together > 1:
        starts = list(range(0, count, file.together))
    else:
        first = min(first_chunks, count)
        starts = [*range(first), *range(first, count, per_read)]
    return list(itertools.pairwise([*starts, count]))
