"""The methods of `CheckpointStore` that are about the disk cache: pull, list, pin, evict, verify."""

# ruff: noqa: ARG002, N802 - gRPC hands every method its request and context, and names it

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from services.store.catalog import Catalog
from services.store.disk_cache.cache import CachedFolder, DiskCache
from services.store.messages import transfers
from services.store.pulls import Pulls
from services.store.remote.checkpoints import NO_CACHE
from stoker.checkpoint.verify import VerifyReport, verify
from stoker.errors import CheckpointInvalid, DiskFull, NotFound
from stoker.v1 import checkpoint_store_pb2 as pb

Context = Any  # grpc.aio.ServicerContext; handlers here never touch it


class CopiesService:
    """A part of the service: answers from the disk cache."""

    def __init__(self, *, catalog: Catalog, pulls: Pulls, cache: DiskCache | None) -> None:
        """Args: cache: None = this store has none."""
        self._names = catalog
        self._pulls = pulls
        self._cache = cache

    async def Pull(self, request: pb.PullRequest, context: Context) -> AsyncIterator[pb.PullProgress]:
        """Tell how far the pull is until it has ended; it goes on when the caller leaves."""
        async for entry, disk_bytes, moved in self._pulls.pull(request.uri, revision=request.revision):
            yield pb.PullProgress(
                checkpoint=entry.info,
                disk_bytes=disk_bytes,
                total_bytes=entry.index.weight_bytes,
                transfers=transfers(moved),
            )

    async def ListCopies(self, request: pb.ListCopiesRequest, context: Context) -> pb.ListCopiesResponse:
        """Return what the cache holds."""
        cache = self._cache
        if cache is None:
            return pb.ListCopiesResponse()
        return pb.ListCopiesResponse(
            copies=[_copy(cache, each) for each in cache.folders()],
            quota_bytes=cache.quota_bytes,
            folder=str(cache.root),
        )

    async def PinCopy(self, request: pb.PinCopyRequest, context: Context) -> pb.PinCopyResponse:
        """Keep a copy, or no longer."""
        cache, found = await self._found(request.uri)
        try:
            await asyncio.to_thread(cache.pin, found, pinned=request.pinned)
        except OSError as error:
            raise DiskFull(f"the pin of {request.uri} cannot be written: {error.strerror}") from error
        return pb.PinCopyResponse()

    async def EvictCopy(self, request: pb.EvictCopyRequest, context: Context) -> pb.EvictCopyResponse:
        """Delete the copies of a checkpoint."""
        cache, found = await self._found(request.uri)
        freed = await asyncio.to_thread(cache.evict, found.record.uri)
        return pb.EvictCopyResponse(freed_bytes=freed)

    async def VerifyCopy(self, request: pb.VerifyCopyRequest, context: Context) -> pb.VerifyCopyResponse:
        """Read a copy completely; what is wrong is noted as missing."""
        cache, found = await self._found(request.uri)
        if not found.whole:
            raise CheckpointInvalid(
                f"the copy of {request.uri} is not whole yet; `stoker pull {request.uri}` first"
            )
        cache.hold(found, 1)
        try:
            report = await asyncio.to_thread(verify, cache.folder_of(found))
        finally:
            cache.hold(found, -1)
        await asyncio.to_thread(_forget, cache, report)
        return pb.VerifyCopyResponse(
            checked_bytes=report.bytes_checked,
            digests_checked=report.digests_checked,
            damaged=[
                pb.DamagedPart(
                    file=bad.file,
                    offset=bad.offset,
                    bytes=bad.size_bytes,
                    reason=f"expected {bad.expected}, found {bad.found}",
                )
                for bad in report.bad
            ],
        )

    async def _found(self, uri: str) -> tuple[DiskCache, CachedFolder]:
        if self._cache is None:
            raise NotFound(NO_CACHE)
        found = self._cache.find(await self._names.known_as(uri))
        if found is None:
            raise NotFound(f"the disk cache has no copy of {uri}; see `stoker cache ls`")
        return self._cache, found


def _copy(cache: DiskCache, each: CachedFolder) -> pb.Copy:
    return pb.Copy(
        uri=each.record.uri,
        revision=each.record.revision,
        disk_bytes=each.size_bytes if each.partial is None else each.partial.bytes_there(),
        total_bytes=each.size_bytes,
        pinned=each.pinned,
        in_use=each.readers > 0,
        superseded=each.superseded,
        last_used_unix_seconds=each.uses.at_seconds,
        folder=str(cache.folder_of(each)),
        whole=each.whole,
    )


def _forget(cache: DiskCache, report: VerifyReport) -> None:
    for bad in report.bad:
        cache.forget_bytes(report.path / bad.file, [(bad.offset, bad.offset + bad.size_bytes)])
