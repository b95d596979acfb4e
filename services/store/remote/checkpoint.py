"""One remote checkpoint: which sources its files have now, and where what arrives is put."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from services.store import metrics
from services.store.chain import Chain, FarFile, Link, OpenFile, Refusal, Tier, run_chunks
from services.store.disk_cache.cache import CachedFolder, DiskCache
from services.store.disk_cache.record import OriginRecord
from services.store.far_weights import OpenedFile, OpenOnDisk
from services.store.integrity.digests import FileDigests
from services.store.origins.ranges import Ranges
from services.store.origins.source import OriginSource
from services.store.reading.lanes import Lane
from stoker import log
from stoker.checkpoint.index import CheckpointFile


class RemoteCheckpoint:
    """See `FarWeights`."""

    def __init__(  # noqa: PLR0913 - what it is, and the tiers it may come from
        self,
        record: OriginRecord,
        *,
        ranges: Ranges,
        digest_bytes: int,
        cache: DiskCache | None,
        cached: CachedFolder | None,
        peers: OpenFile | None,
        uncached_because: str = "",
    ) -> None:
        """Take what is known.

        Args:
            record: Where it comes from.
            ranges: Of its origin.
            digest_bytes: What one of its digests covers.
            cache: The disk cache; None = there is none.
            cached: Its folder there; None = it is not kept on disk.
            peers: Gives what other stores have; None = there are none.
            uncached_because: Why it is not kept on disk, and what would change that.
        """
        self.record = record
        self.cached = cached
        self.ranges = ranges
        self.uncached_because = uncached_because
        self._digest_bytes = digest_bytes
        self._cache = cache
        self._peers = peers

    @property
    def whole(self) -> bool:
        """See `FarWeights`."""
        return self.cached is not None and self.cached.whole

    def locate(self, file: CheckpointFile) -> Path:
        """See `FarWeights`."""
        partial = None if self.cached is None else self.cached.partial
        return file.path if partial is None else partial.folder / file.name

    def disk_bytes(self) -> int:
        """See `FarWeights`."""
        cached = self.cached
        if cached is None:
            return 0
        return cached.size_bytes if cached.partial is None else cached.partial.bytes_there()

    def open(
        self, file: CheckpointFile, on_disk: OpenOnDisk, *, chunk_bytes: int, gives_way: bool = False
    ) -> OpenedFile:
        """See `FarWeights`; one that gives way raises `GaveWay` when another load takes the file over."""
        far = self.far_file(file)
        origin = OriginSource(self.ranges, self.record.files[file.name])
        links = [Link(tier=Tier.ORIGIN, source=origin)]
        if self._peers is not None and not self.whole:
            peer = self._peers(far, origin, chunk_bytes=chunk_bytes, gives_way=gives_way)
            links += [] if peer is None else [Link(tier=Tier.PEER, source=peer)]
        on_this_host = self._on_this_host(file, on_disk)
        if on_this_host is not None:
            links.append(on_this_host)
        self._hold(1)
        return OpenedFile(
            source=Chain(far, links, self._refused, closed=lambda: self._hold(-1)),
            lane=Lane.DISK if self.whole else Lane.FAR,
            together=run_chunks(far, chunk_bytes),
            land=None if self.cached is None else self._landing(file.name),
        )

    def far_file(self, file: CheckpointFile) -> FarFile:
        """Return what peers and origins are asked for."""
        digests = None
        if file.chunk_digests:
            digests = FileDigests(
                size_bytes=file.size_bytes, part_bytes=self._digest_bytes, texts=file.chunk_digests
            )
        return FarFile(
            uri=self.record.uri,
            revision=self.record.revision,
            name=file.name,
            size_bytes=file.size_bytes,
            digests=digests,
        )

    def _on_this_host(self, file: CheckpointFile, on_disk: OpenOnDisk) -> Link | None:
        if self._cache is None or self.cached is None:
            return None
        if self.cached.whole and file.path.parent == self._cache.place(self.record):
            return Link(tier=Tier.CACHE, source=on_disk(file), checked=True)
        if self.cached.partial is None:
            return None
        self.cached.partial.resume()
        return Link(tier=Tier.CACHE, source=self.cached.partial.source(file.name))

    def _hold(self, count: int) -> None:
        if self._cache is not None and self.cached is not None:
            self._cache.hold(self.cached, count)

    def _landing(self, name: str) -> _Landing:
        return _Landing(self, name)

    def _refused(self, refusal: Refusal) -> None:
        metrics.REFUSED_SOURCES.labels(
            tier=refusal.tier.name.lower(), reason="damaged" if refusal.damaged else "failed"
        ).inc()
        log.get().warning(
            "source.refused",
            uri=self.record.uri,
            file=refusal.file,
            tier=refusal.tier.name.lower(),
            source=refusal.source,
            offset_bytes=refusal.offset,
            bytes=refusal.length,
            damaged=refusal.damaged,
            reason=refusal.reason,
        )
        partial = None if self.cached is None else self.cached.partial
        if refusal.tier is Tier.CACHE and refusal.damaged and partial is not None and not partial.whole:
            partial.forget(refusal.file, refusal.offset, refusal.offset + refusal.length)


class _Landing:
    """Puts one file's chunks onto the disk; see `Land`."""

    def __init__(self, checkpoint: RemoteCheckpoint, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name

    def __call__(self, chunks: Sequence[memoryview], offset: int, length: int) -> None:
        cached = self._checkpoint.cached
        if cached is not None and cached.partial is not None:
            cached.partial.land(self._name, chunks, offset, length)
