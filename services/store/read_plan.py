"""From a checkpoint and the chunks it was given to the reads that fill them, in order. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from services.store.catalog import CatalogEntry
from services.store.disk_sources import DiskSources
from services.store.far_weights import OpenedFile
from services.store.read_queue import ChunkRead
from services.store.resident import ResidentFile
from stoker.checkpoint.index import CheckpointFile
from stoker.checkpoint.layout import chunk_count


def chunks_needed(entry: CatalogEntry, chunk_bytes: int) -> int:
    """Return how many chunks a checkpoint takes; each file starts a new one."""
    return sum(chunk_count(file.size_bytes, chunk_bytes) for file in entry.index.files)


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


def plan_reads(
    files: Sequence[ResidentFile], *, load: int, ranks: bool, memory: Callable[[int], memoryview]
) -> list[ChunkRead]:
    """Return a load's reads in order.

    Args:
        files: Laid out.
        load: Its key.
        ranks: Files are ranks that are used side by side, so their chunks take turns; otherwise they are
            shards that are used one after the other.
        memory: Gives the memory of a chunk.
    """
    by_file = [
        [
            ChunkRead(
                load=load,
                file=number,
                index=index,
                source=file.source,
                chunks=tuple(memory(chunk) for chunk in file.chunks[index : index + file.together]),
                length=min(file.together * file.chunk_bytes, file.size_bytes - index * file.chunk_bytes),
            )
            for index in range(0, len(file.chunks), file.together)
        ]
        for number, file in enumerate(files)
        if file.source is not None
    ]
    if ranks:
        return [read for turn in itertools.zip_longest(*by_file) for read in turn if read is not None]
    return [read for reads in by_file for read in reads]
