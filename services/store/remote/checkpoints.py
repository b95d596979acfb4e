"""All remote checkpoints that this store knows: opened once each, kept on its disk where there is room.

A revision that is known is served without asking its origin. Otherwise the origin is asked which files it has
now: the same as before, then the checkpoint is the same; others, then it is opened anew and the old one is
superseded. An origin that cannot be reached is no obstacle where the disk has all of a checkpoint.
"""

from __future__ import annotations

import shutil
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

from services.store import metrics
from services.store.catalog import CatalogEntry, local_path, read_entry
from services.store.chain import OpenFile
from services.store.disk_cache import record as origin_record
from services.store.disk_cache.cache import CachedFolder, DiskCache
from services.store.disk_cache.quota import NoRoom
from services.store.disk_cache.record import RECORD_NAME, OriginRecord
from services.store.origins.origin import Broken, Origin, RemoteFile
from services.store.origins.ranges import Ranges, Retry
from services.store.origins.uris import open_origin, remote_uri, shared_folder
from services.store.remote.checkpoint import RemoteCheckpoint
from services.store.remote.skeleton import Described, build_skeleton, describe, unchanged
from stoker import log
from stoker.errors import CheckpointInvalid, DiskFull, InvalidRequest, PeerError
from stoker.ids import Revision, new_id
from stoker.units import GB
from stoker.v1 import model_pb2

MAX_KNOWN = 1024
NO_CACHE = "this store has no disk cache; set STOKER_STORE_CACHE_DIR"
ASSUMED_BYTES_PER_SECOND = 0.5 * GB
"""Of origins; only the order of evictions depends on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemotePlan:
    """What the store was told about remote checkpoints.

    Attributes:
        timeout_seconds: Of a connect, and of each wait for bytes.
        retry: How often a failing origin is asked, and how long apart.
        shared_roots: Folders on shared file systems: what lies there is treated as far away.
        skeletons: A folder for headers of checkpoints that are not kept on disk; emptied at start.
    """

    timeout_seconds: float
    retry: Retry
    shared_roots: tuple[Path, ...]
    skeletons: Path


class RemoteCheckpoints:
    """See `OpensRemote`."""

    def __init__(self, plan: RemotePlan, *, cache: DiskCache | None, peers: OpenFile | None = None) -> None:
        """Args: cache: None = nothing is kept on disk. peers: the tier of other stores."""
        self._plan = plan
        self._cache = cache
        self._peers = peers
        self._roots = tuple(root.resolve() for root in plan.shared_roots)
        self._mutex = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}
        self._known: OrderedDict[str, CatalogEntry] = OrderedDict()
        self._origins: dict[str, Ranges] = {}
        self._stopped = threading.Event()
        shutil.rmtree(plan.skeletons, ignore_errors=True)

    def known_as(self, uri: str) -> str | None:
        """See `OpensRemote`.

        Raises:
            InvalidRequest: It is of a remote kind and malformed.
        """
        found = remote_uri(uri)
        if found is not None:
            return found.text
        if self._roots:
            path = local_path(uri)
            if ".." not in path.parts and any(path.is_relative_to(root) for root in self._roots):
                return str(path)
        return None

    def open(self, uri: str, *, revision: str) -> CatalogEntry:
        """See `OpensRemote`."""
        with self._lock_of(uri):
            known = self._usable(uri)
            if revision and known is not None and known.index.revision == revision:
                return known
            if revision and self._cache is not None:
                cached = self._cache.find(uri, revision)
                if cached is not None:
                    return self._remember(self._entry_of(cached))
            return self._remember(self._ask(uri, known))

    def on_disk(self) -> list[CatalogEntry]:
        """See `OpensRemote`; what cannot be opened is dropped from the cache."""
        entries = []
        for cached in [] if self._cache is None else self._cache.folders():
            try:
                entries.append(self._remember(self._entry_of(cached)))
            except (CheckpointInvalid, OSError) as error:
                log.get().warning("cache.folder_unusable", uri=cached.record.uri, reason=str(error))
        return entries

    def close(self) -> None:
        """Let go of origins; reads that wait for one give up."""
        self._stopped.set()
        with self._mutex:
            origins, self._origins = list(self._origins.values()), {}
        for ranges in origins:
            ranges.origin.close()

    def _lock_of(self, uri: str) -> threading.Lock:
        with self._mutex:
            return self._opening.setdefault(uri, threading.Lock())

    def _usable(self, uri: str) -> CatalogEntry | None:
        """Return what is known of a uri, brought up to date with the disk; None when its folder is gone."""
        entry = self._known.get(uri)
        if entry is None or not isinstance(entry.far, RemoteCheckpoint):
            return None
        cached = entry.far.cached
        if cached is not None and self._cache is not None:
            if self._cache.find(uri, entry.index.revision) is not cached:
                return None  # evicted from the disk
            folder = self._cache.folder_of(cached)
            if folder != entry.index.path:
                return self._remember(self._entry_of(cached))
        return entry if entry.index.path.is_dir() else None

    def _ask(self, uri: str, known: CatalogEntry | None) -> CatalogEntry:
        ranges = self._ranges(uri)
        cached = None if self._cache is None else self._cache.find(uri)
        before: dict[str, RemoteFile] = {}
        if known is not None and isinstance(known.far, RemoteCheckpoint):
            before = dict(known.far.record.files)
        elif cached is not None:
            before = dict(cached.record.files)
        try:
            described = describe(ranges, known=before)
        except PeerError as error:
            return self._without_origin(uri, known, error)
        if before and unchanged(described, list(before.values())):
            if known is not None and not self._may_land_now(known):
                return known
            if known is None and cached is not None:
                return self._entry_of(cached)
        if cached is not None:
            cached.superseded = True
        return self._open_anew(uri, ranges, described)

    def _may_land_now(self, known: CatalogEntry) -> bool:
        """Tell whether a checkpoint that got no room in the disk cache may get it by now."""
        uncached = isinstance(known.far, RemoteCheckpoint) and known.far.cached is None
        return uncached and self._cache is not None and self._cache.has_room(known.index.weight_bytes)

    def _without_origin(self, uri: str, known: CatalogEntry | None, error: PeerError) -> CatalogEntry:
        cached = None if self._cache is None else self._cache.find(uri)
        if known is None and (cached is None or not cached.whole):
            raise error
        log.get().warning("origin.unreachable", uri=uri, reason=error.message, action="serving what is here")
        if known is not None:
            return known
        if cached is None:
            raise error
        return self._entry_of(cached)

    def _open_anew(self, uri: str, ranges: Ranges, described: Described) -> CatalogEntry:
        """Read a checkpoint's headers; into the disk cache, or past it where its disk doesn't take them."""
        why = NO_CACHE
        if self._cache is not None:
            try:
                return self._read(uri, ranges, described, self._cache)
            except OSError as error:
                why = f"{self._cache.root} takes nothing: {error.strerror or error}; free space there"
                _no_room(uri, why, metric="error")
        try:
            return self._read(uri, ranges, described, None, why=why)
        except OSError as error:
            raise DiskFull(
                f"{uri}: its headers cannot be written to {self._plan.skeletons}: {error.strerror or error}; "
                "free space there, or set STOKER_STORE_RUN_DIR"
            ) from error

    def _read(
        self, uri: str, ranges: Ranges, described: Described, cache: DiskCache | None, *, why: str = ""
    ) -> CatalogEntry:
        """Read headers; `why` says why there is no cache to put them into."""
        staged = self._staging(cache)
        try:
            files = build_skeleton(ranges, described, staged)
            read = read_entry(staged)
            record = OriginRecord(uri=uri, revision=read.index.revision, files=files)
            (staged / RECORD_NAME).write_bytes(origin_record.render(record))
            return self._keep(staged, record, [file.name for file in read.index.files], cache, why)
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # it is elsewhere by now, or of no use

    def _keep(
        self, staged: Path, record: OriginRecord, weights: list[str], cache: DiskCache | None, why: str
    ) -> CatalogEntry:
        """Give the staged folder to the disk cache, or, where that has no room, to the skeletons."""
        if cache is not None:
            before = cache.find(record.uri, record.revision)
            if before is not None:
                return self._entry_of(before)
            adopted = cache.adopt(staged, record, weights, ASSUMED_BYTES_PER_SECOND)
            if not isinstance(adopted, NoRoom):
                return self._entry_of(adopted)
            why = adopted.reason
            _no_room(record.uri, why, metric="quota")
        folder = self._plan.skeletons / origin_record.folder_name(record.uri, record.revision)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.move(staged, folder)
        return self._made(folder.resolve(), record, None, why=why)

    def _staging(self, cache: DiskCache | None) -> Path:
        if cache is not None:
            return cache.staging()
        folder = self._plan.skeletons / new_id("staged")
        folder.mkdir(parents=True, mode=0o700)
        return folder.resolve()

    def _entry_of(self, cached: CachedFolder) -> CatalogEntry:
        if self._cache is None:
            raise InvalidRequest(f"{cached.record.uri}: this store has no disk cache")
        self._cache.used(cached)
        return self._made(self._cache.folder_of(cached), cached.record, cached)

    def _made(
        self, folder: Path, record: OriginRecord, cached: CachedFolder | None, *, why: str = ""
    ) -> CatalogEntry:
        read = read_entry(folder)
        info = model_pb2.CheckpointInfo()
        info.CopyFrom(read.info)
        info.uri, info.revision, info.far = record.uri, record.revision, True
        return replace(
            read,
            index=replace(read.index, revision=Revision(record.revision)),
            info=info,
            far=RemoteCheckpoint(
                record,
                ranges=self._ranges(record.uri),
                digest_bytes=read.index.chunk_bytes,
                cache=self._cache,
                cached=cached,
                peers=self._peers,
                uncached_because=why,
            ),
        )

    def _remember(self, entry: CatalogEntry) -> CatalogEntry:
        with self._mutex:
            self._known[entry.uri] = entry
            self._known.move_to_end(entry.uri)
            while len(self._known) > MAX_KNOWN:
                gone, forgotten = self._known.popitem(last=False)
                self._opening.pop(gone, None)
                if isinstance(forgotten.far, RemoteCheckpoint) and forgotten.far.cached is None:
                    shutil.rmtree(forgotten.index.path, ignore_errors=True)
        return entry

    def _ranges(self, uri: str) -> Ranges:
        with self._mutex:
            if uri not in self._origins:
                self._origins[uri] = Ranges(
                    self._origin(uri), retry=self._plan.retry, stopped=self._stopped, told=_attempt_failed
                )
            return self._origins[uri]

    def _origin(self, uri: str) -> Origin:
        found = remote_uri(uri)
        if found is None:
            return shared_folder(Path(uri))
        return open_origin(found, timeout_seconds=self._plan.timeout_seconds)


def _no_room(uri: str, reason: str, *, metric: str) -> None:
    metrics.LANDING_FAILURES.labels(reason=metric).inc()
    log.get().warning("cache.no_room", uri=uri, reason=reason, action="loaded past the disk")


def _attempt_failed(error: Broken) -> None:
    metrics.ORIGIN_ATTEMPTS_FAILED.inc()
    log.get().info("origin.attempt_failed", message=error.message, done_bytes=error.done_bytes)
