"""What the pool shares with other stores: chunks as they arrive, until their room is wanted.

A chunk that is being sent keeps its room: a resident that is gone is settled when the last of its chunks has
been sent, which the senders' deadlines bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from services.store.catalog import CatalogEntry
from services.store.peers.exchange import Exchange
from services.store.peers.shared_file import DiskCopy
from services.store.peers.wire import FileIdentity
from services.store.pool.resident import Resident
from services.store.reading.read_queue import ChunkRead
from stoker.checkpoint.index import CheckpointFile


class Sharing:
    """Between loads, pulls and the exchange; used from the event loop only, `landed` from any thread."""

    def __init__(self, exchange: Exchange, *, chunk_bytes: int) -> None:
        """Args: exchange: where peers find chunks. chunk_bytes: of the pool."""
        self._exchange = exchange
        self._chunk_bytes = chunk_bytes
        self._loop = asyncio.get_running_loop()

    def arrived(self, resident: Resident, read: ChunkRead) -> None:
        """Share the chunks of a read that has ended well."""
        identity = self._identity(resident, read.file)
        for number, chunk in enumerate(read.chunks):
            self._exchange.put(identity, resident.key, read.index + number, chunk)

    def landed(self, revision: str, file: CheckpointFile, bits: int, locate: Callable[[], Path]) -> None:
        """Share chunks of a file that have arrived on this host's disk alone; see `Exchange.landed`."""
        identity = FileIdentity(
            revision=revision, name=file.name, size_bytes=file.size_bytes, chunk_bytes=self._chunk_bytes
        )
        self._exchange.landed(identity, bits, locate)

    def withdrawn(self, resident: Resident, idle: Callable[[], None]) -> bool:
        """Share a resident no more; True when none of its chunks is being sent.

        Args:
            resident: Who is gone.
            idle: Called on the loop when a file's last chunk was sent, if some are being sent now.
        """
        quiet = True
        for number in range(len(resident.files)):
            file_id = self._identity(resident, number).file_id
            quiet &= self._exchange.withdraw(file_id, resident.key, lambda: self._call(idle))
        return quiet

    def _call(self, idle: Callable[[], None]) -> None:
        """Called from a sender's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(idle)

    def _identity(self, resident: Resident, number: int) -> FileIdentity:
        index = resident.entry.index
        file = index.files[number]
        return FileIdentity(
            revision=index.revision,
            name=file.name,
            size_bytes=file.size_bytes,
            chunk_bytes=self._chunk_bytes,
        )


def disk_copy(entries: Iterable[CatalogEntry], identity: FileIdentity) -> DiskCopy | None:
    """Return where this host's disk has a file that a peer asks for; pure.

    Only files with digests: who gets one checks it against the digests that made its revision, so it matters
    little what became of this copy since it was written.

    Args:
        entries: What the catalog knows.
        identity: Of the file.
    """
    for entry in entries:
        if entry.index.revision != identity.revision or not (entry.far is None or entry.far.whole):
            continue
        for file in entry.index.files:
            if (file.name, file.size_bytes) == (identity.name, identity.size_bytes) and file.chunk_digests:
                return DiskCopy(locate=partial(_place, entry, file), have=(1 << identity.chunks) - 1)
    return None


def _place(entry: CatalogEntry, file: CheckpointFile) -> Path:
    return file.path if entry.far is None else entry.far.locate(file)
