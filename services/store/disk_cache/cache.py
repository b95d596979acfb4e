"""The folders of the disk cache: whole checkpoints, those under way, and who makes room for whom.

    <cache>/lock                 held by the one daemon that uses the folder
    <cache>/checkpoints/<key>/   whole: checkpoints like any other, and where they came from
    <cache>/partial/<key>/       under way: the same with sparse weights and a journal
    <cache>/trash/               being deleted; emptied at start

A folder moves between them by renaming, so a crash leaves it in exactly one of them. What cannot be
understood is moved to the trash: it is a copy. When each was used last is the time of its origin record.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.store import metrics
from services.store.disk_cache import record as origin_record
from services.store.disk_cache.journal import JOURNAL_NAME
from services.store.disk_cache.partial import PartialCheckpoint
from services.store.disk_cache.quota import Copy, NoRoom, Room, make_room
from services.store.disk_cache.record import RECORD_NAME, OriginRecord
from services.store.pool.eviction import Uses
from stoker import log
from stoker.checkpoint.folder import read_bounded
from stoker.errors import CheckpointInvalid, ConfigError, InUse, NotFound
from stoker.ids import new_id

PIN_NAME = "stoker-pin"
WHOLE, PARTIAL, TRASH = "checkpoints", "partial", "trash"


@dataclass(slots=True, kw_only=True)
class CachedFolder:
    """A checkpoint in the cache.

    Attributes:
        record: Where it came from.
        size_bytes: Of its weights files.
        partial: Its state while it is under way; None when whole.
        uses: On the wall clock.
        pinned: Stays.
        readers: Loads that read or write it now.
        superseded: The origin has another revision.
    """

    record: OriginRecord
    size_bytes: int
    partial: PartialCheckpoint | None
    uses: Uses
    pinned: bool
    readers: int = 0
    superseded: bool = False

    @property
    def whole(self) -> bool:
        """Whether all of it is there."""
        return self.partial is None or self.partial.whole


class DiskCache:
    """The folder; any thread."""

    def __init__(
        self, folder: Path, *, quota_bytes: int, unix_seconds: Callable[[], float] = time.time
    ) -> None:
        """Take the folder over and find what is in it.

        Args:
            folder: Made where missing.
            quota_bytes: Of all weights together; 0 = nine tenths of what is free or theirs now.
            unix_seconds: The clock.

        Raises:
            ConfigError: The folder can't be used, or another daemon uses it.
        """
        self.quota_bytes = quota_bytes
        self._unix_seconds = unix_seconds
        self._mutex = threading.RLock()
        self._folders: dict[str, CachedFolder] = {}
        try:
            for name in (WHOLE, PARTIAL, TRASH):
                (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            self.root = folder.resolve()
            self._lock_file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._scan()
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder} is used by another store daemon; give each its own STOKER_STORE_CACHE_DIR"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be the disk cache: {error.strerror or error}; set STOKER_STORE_CACHE_DIR"
            ) from error
        self._measure()
        if not quota_bytes:
            theirs = sum(each.size_bytes for each in self._folders.values())
            self.quota_bytes = int((shutil.disk_usage(self.root).free + theirs) * 0.9)

    def place(self, record: OriginRecord) -> Path:
        """Return where a checkpoint lies when it is whole."""
        return self.root / WHOLE / origin_record.folder_name(record.uri, record.revision)

    def find(self, uri: str, revision: str = "") -> CachedFolder | None:
        """Return a checkpoint of the cache; without a revision the one that is not superseded, used last."""
        with self._mutex:
            found = [
                each
                for each in self._folders.values()
                if each.record.uri == uri and revision in {"", each.record.revision}
            ]
        return max(found, key=lambda each: (not each.superseded, each.uses.at_seconds), default=None)

    def folders(self) -> list[CachedFolder]:
        """Return all that is in the cache, the least recently used first."""
        with self._mutex:
            return sorted(self._folders.values(), key=lambda each: each.uses.at_seconds)

    def folder_of(self, cached: CachedFolder) -> Path:
        """Return where a checkpoint lies now."""
        return self.place(cached.record) if cached.partial is None else cached.partial.folder

    def adopt(
        self, staged: Path, record: OriginRecord, weights: list[str], bytes_per_second: float
    ) -> CachedFolder | NoRoom:
        """Take a folder with small files and sparse weights over, if there is room for its weights.

        Args:
            staged: On the cache's disk, made by `staging`; is the cache's from now on if there is room.
            record: Where it comes from.
            weights: Names of its weights files.
            bytes_per_second: How fast copies come back from where they came.

        Raises:
            OSError: The disk can't.
        """
        need_bytes = sum(record.files[name].size_bytes for name in weights)
        with self._mutex:
            room = self._room(need_bytes, bytes_per_second)
            if isinstance(room, NoRoom):
                return room
            for key in room.evict:
                self._drop(key, "room")
            key = origin_record.folder_name(record.uri, record.revision)
            folder = self.root / PARTIAL / key
            staged.rename(folder)
            cached = self._take_up(key, folder, record, weights)
            self._measure()
            return cached

    def has_room(self, need_bytes: int) -> bool:
        """Tell whether so many bytes of weights would be taken now, others going for them or not."""
        with self._mutex:
            return not isinstance(self._room(need_bytes, 1.0), NoRoom)

    def _room(self, need_bytes: int, bytes_per_second: float) -> Room | NoRoom:
        """Decide what `need_bytes` more would take; the lock is held."""
        return make_room(
            [self._as_copy(key, each, bytes_per_second) for key, each in self._folders.items()],
            need_bytes=need_bytes,
            quota_bytes=self.quota_bytes,
            now_seconds=self._unix_seconds(),
        )

    def staging(self) -> Path:
        """Make and return an empty folder on the cache's disk."""
        folder = self.root / TRASH / new_id("staged")
        folder.mkdir(mode=0o700)
        return folder

    def used(self, cached: CachedFolder) -> None:
        """Note a use."""
        now = self._unix_seconds()
        with self._mutex:
            cached.uses = cached.uses.used(now)
        try:
            os.utime(self.folder_of(cached) / RECORD_NAME, (now, now))
        except OSError as error:
            log.get().warning("cache.use_not_noted", uri=cached.record.uri, reason=error.strerror)

    def hold(self, cached: CachedFolder, count: int) -> None:
        """Count a reader more (1) or less (-1): what is being read is never deleted."""
        with self._mutex:
            cached.readers += count

    def pin(self, cached: CachedFolder, *, pinned: bool) -> None:
        """Keep a copy whatever comes, or no longer.

        Raises:
            OSError: The disk can't.
        """
        path = self.folder_of(cached) / PIN_NAME
        if pinned:
            path.touch(mode=0o600)
        else:
            path.unlink(missing_ok=True)
        with self._mutex:
            cached.pinned = pinned

    def evict(self, uri: str) -> int:
        """Delete the copies of a checkpoint; returns the bytes of weights that were there.

        Raises:
            NotFound: There is none.
            InUse: It is pinned, or being read.
        """
        with self._mutex:
            found = {key: each for key, each in self._folders.items() if each.record.uri == uri}
            if not found:
                raise NotFound(f"the disk cache has no copy of {uri}; see `stoker cache ls`")
            for each in found.values():
                if each.pinned or each.readers:
                    why = "it is pinned; unpin it" if each.pinned else "it is being read; try again"
                    raise InUse(f"the disk cache's copy of {uri} stays: {why}")
            return sum(self._drop(key, "asked") for key in found)

    def forget_bytes(self, path: Path, ranges: list[tuple[int, int]]) -> None:
        """Have bytes of a copy that were found to be wrong fetched again: the copy is under way once more."""
        with self._mutex:
            key = path.parent.name
            cached = self._folders.get(key)
            if cached is None:
                return
            if cached.partial is None or cached.partial.whole:
                self._reopen(key, cached)
            if cached.partial is not None and not cached.partial.whole:
                for begin, end in ranges:
                    cached.partial.forget(path.name, begin, end)

    def close(self) -> None:
        """Let go of the folder."""
        with self._mutex:
            for cached in self._folders.values():
                if cached.partial is not None:
                    cached.partial.close()
            self._folders.clear()
            os.close(self._lock_file)

    def _reopen(self, key: str, cached: CachedFolder) -> None:
        """Move a whole copy back among those under way, with all its bytes noted as there."""
        weights = [name for name in cached.record.files if name.endswith(".safetensors")]
        place, folder = self.root / WHOLE / key, self.root / PARTIAL / key
        partial: PartialCheckpoint | None = None
        try:
            place.rename(folder)
            partial = self._partial(key, folder, cached.record, weights)
            partial.note_all()
        except OSError as error:
            log.get().error("cache.not_reopened", uri=cached.record.uri, reason=error.strerror or str(error))
            if partial is not None:
                partial.close()
            with suppress(OSError):
                folder.rename(place)
            return
        if cached.partial is not None:
            cached.partial.close()
        cached.partial = partial

    def _drop(self, key: str, reason: str) -> int:
        cached = self._folders.pop(key)
        there = cached.size_bytes if cached.partial is None else cached.partial.bytes_there()
        trash = self.root / TRASH / new_id("dropped")
        if cached.partial is not None:
            cached.partial.close()  # first: from here on what still lands in it moves no folder
        try:
            self.folder_of(cached).rename(trash)
        except OSError as error:
            log.get().error(
                "cache.not_deleted",
                folder=str(self.folder_of(cached)),
                reason=error.strerror or str(error),
                action="nothing uses it any more; delete it by hand, or it is found again at the next start",
            )
        threading.Thread(target=shutil.rmtree, args=(trash, True), daemon=True).start()
        metrics.CACHE_EVICTIONS.labels(reason=reason).inc()
        self._measure()
        log.get().info("cache.evicted", uri=cached.record.uri, bytes=there, reason=reason)
        return there

    def _measure(self) -> None:
        metrics.CACHE_BYTES.set(sum(each.size_bytes for each in self._folders.values()))

    def _take_up(self, key: str, folder: Path, record: OriginRecord, weights: list[str]) -> CachedFolder:
        cached = self._folders[key] = CachedFolder(
            record=record,
            size_bytes=sum(record.files[name].size_bytes for name in weights),
            partial=self._partial(key, folder, record, weights),
            uses=Uses(count=1.0, at_seconds=(folder / RECORD_NAME).stat().st_mtime),
            pinned=(folder / PIN_NAME).exists(),
        )
        return cached

    def _partial(self, key: str, folder: Path, record: OriginRecord, weights: list[str]) -> PartialCheckpoint:
        return PartialCheckpoint(
            folder,
            record,
            weights=weights,
            whole_folder=self.root / WHOLE / key,
            completed=lambda: metrics.CACHE_COMPLETED.inc(),  # noqa: PLW0108 - looked up at the call
        )

    def _scan(self) -> None:
        for leftover in (self.root / TRASH).iterdir():
            shutil.rmtree(leftover, ignore_errors=True)
        for kind in (WHOLE, PARTIAL):
            for folder in sorted((self.root / kind).iterdir()):
                try:
                    self._found(kind, folder)
                except (OSError, CheckpointInvalid) as error:
                    log.get().warning("cache.folder_dropped", folder=str(folder), reason=str(error))
                    folder.rename(self.root / TRASH / new_id("damaged"))

    def _found(self, kind: str, folder: Path) -> None:
        text = read_bounded(folder / RECORD_NAME, limit_bytes=origin_record.MAX_RECORD_BYTES)
        record = origin_record.parse(text, where=str(folder / RECORD_NAME))
        key = origin_record.folder_name(record.uri, record.revision)
        if key != folder.name:
            raise CheckpointInvalid(f"{folder} is not where {record.uri} belongs")
        weights = [name for name in record.files if name.endswith(".safetensors")]
        cached = self._take_up(key, folder, record, weights) if kind == PARTIAL else None
        if cached is not None and cached.partial is not None:
            cached.partial.finish_if_covered()
            return
        (folder / JOURNAL_NAME).unlink(missing_ok=True)  # a daemon died right after the renaming
        self._folders[key] = CachedFolder(
            record=record,
            size_bytes=sum(record.files[name].size_bytes for name in weights),
            partial=None,
            uses=Uses(count=1.0, at_seconds=(folder / RECORD_NAME).stat().st_mtime),
            pinned=(folder / PIN_NAME).exists(),
        )

    def _as_copy(self, key: str, cached: CachedFolder, bytes_per_second: float) -> Copy:
        return Copy(
            key=key,
            size_bytes=cached.size_bytes,
            reload_seconds=cached.size_bytes / bytes_per_second,
            uses=cached.uses,
            held=cached.pinned or cached.readers > 0,
            superseded=cached.superseded,
        )
