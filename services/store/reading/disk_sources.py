"""How a file that is whole on this host is read: with its digests checked, where there are any."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from services.store.catalog import CatalogEntry
from services.store.integrity.damaged_copies import DamagedCopies
from services.store.integrity.digests import FileDigests
from services.store.integrity.verified_parts import VerifiedParts
from services.store.integrity.verified_source import VerifiedSource
from services.store.reading.chunk_source import ChunkSource
from services.store.settings import VerifyDisk
from stoker.checkpoint.index import CheckpointFile
from stoker.checkpoint.reading import SourceFile

CHECK_THREADS = 2
"""They keep up with a disk of 16 GB/s; started when there is something to check."""


class DiskSources:
    """Opens files by one policy."""

    def __init__(self, policy: VerifyDisk, parts: VerifiedParts, damaged: DamagedCopies) -> None:
        """Take what all files share."""
        self._policy = policy
        self._checkers = ThreadPoolExecutor(max_workers=CHECK_THREADS, thread_name_prefix="check")
        self._parts = parts
        self._damaged = damaged

    def open(self, entry: CatalogEntry, file: CheckpointFile) -> ChunkSource:
        """Return the source of one of a checkpoint's files; nothing is read yet."""
        signature = entry.signatures[file.name]
        source = SourceFile(file.path, signature)
        if self._policy is VerifyDisk.NEVER or not file.chunk_digests:
            return source
        return VerifiedSource(
            source,
            file.path,
            FileDigests(
                size_bytes=file.size_bytes, part_bytes=entry.index.chunk_bytes, texts=file.chunk_digests
            ),
            signature=signature,
            policy=self._policy,
            parts=self._parts,
            report=self._damaged.found,
            checkers=self._checkers,
        )

    def close(self) -> None:
        """Let the threads that check end; no read is running."""
        self._checkers.shutdown(wait=False)

    def step_bytes(self, entry: CatalogEntry, file: CheckpointFile) -> int:
        """Return in which steps a file's ready counter may move: parts that are checked, or bytes."""
        checked = self._policy is not VerifyDisk.NEVER and file.chunk_digests
        return entry.index.chunk_bytes if checked else 1
