"""A checkpoint whose weights are arriving in its folder: sparse files and the journal of what is there.

Bytes are written, made durable and only then noted; what is noted can be read. When the last byte is there
the folder is renamed into the place of whole checkpoints: from then on it is one like any other. Everything
is opened relative to the folder's descriptor, so that reads and writes under way survive the renaming.

The cache may drop the folder at any moment, and take up another of the same name. So `close` and the renaming
exclude each other, and descriptors are given up when the last read or write that uses them has ended: none
ever touches a folder that got their number afterwards.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from services.store import metrics
from services.store.chain import NotHere
from services.store.disk_cache.intervals import Intervals
from services.store.disk_cache.journal import JOURNAL_NAME, Entry, Journal
from services.store.disk_cache.record import RECORD_NAME, OriginRecord, modified_ns
from stoker import log
from stoker.checkpoint.reading import DISK, ReadPart
from stoker.errors import LoadFailed

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class PartialCheckpoint:
    """A folder under way; any thread."""

    def __init__(
        self,
        folder: Path,
        record: OriginRecord,
        *,
        weights: Sequence[str],
        whole_folder: Path,
        completed: Callable[[], None],
    ) -> None:
        """Take up a folder that has small files and sparse weights files.

        Args:
            folder: Where it lies.
            record: Where it comes from.
            weights: Names of its weights files.
            whole_folder: Where it goes when it is whole.
            completed: Called from a writing thread when it is there.

        Raises:
            OSError: The disk can't.
        """
        self.folder = folder
        self.record = record
        self._whole_folder = whole_folder
        self._completed = completed
        self._directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._journal = Journal(self._directory)
        self._lock = threading.Lock()
        self._there = {name: Intervals() for name in weights}
        self._whole = False
        self._finishing = False
        self._closed = False
        self._users = 1
        self._stopped_because = ""
        for entry in self._journal.entries():
            self._note(entry)

    @property
    def whole(self) -> bool:
        """Whether all bytes are there and the folder is in its place."""
        return self._whole

    @property
    def stopped_because(self) -> str:
        """Why nothing is written any more; empty while the disk takes it."""
        return self._stopped_because

    def bytes_there(self) -> int:
        """Return the bytes of weights that are there."""
        with self._lock:
            return sum(found.total() for found in self._there.values())

    def has(self, name: str, begin: int, end: int) -> bool:
        """Tell whether these bytes of a file are there."""
        with self._lock:
            return self._there[name].covers(begin, end)

    def source(self, name: str) -> PartialSource:
        """Return what reads a file's bytes as far as they are there."""
        return PartialSource(self, name)

    def read_into(self, name: str, into: memoryview, offset: int) -> None:
        """Fill `into` from the file; the bytes are there.

        Raises:
            NotHere: The folder was given up.
            LoadFailed: The file ends early.
            OSError: The disk can't.
        """
        with self._in_use() as usable:
            if not usable:
                raise NotHere("the copy was dropped")
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._directory)
            try:
                done = 0
                while done < len(into):
                    count = os.preadv(descriptor, [into[done:]], offset + done)
                    if count == 0:
                        raise LoadFailed(f"{self.folder / name} ends early; it is fetched again")
                    done += count
            finally:
                os.close(descriptor)

    def land(self, name: str, chunks: Sequence[memoryview], offset: int, length: int) -> None:
        """Write chunks that arrived and were verified; blocks until they are durable.

        A disk that is full or fails costs the copy, not the load: the first failure is told and nothing more
        is written until `resume`.
        """
        with self._in_use() as usable:
            if not usable or self._stopped_because:
                return
            if not self.has(name, offset, offset + length):
                began = time.monotonic()
                try:
                    self._write(name, chunks, offset, length)
                    self._record(Entry(there=True, file=name, begin=offset, end=offset + length))
                except OSError as error:
                    self._stop(error)
                    return
                metrics.LANDED_BYTES.inc(length)
                metrics.LANDED_SECONDS.inc(time.monotonic() - began)
        self.finish_if_covered()

    def forget(self, name: str, begin: int, end: int) -> None:
        """Note that these bytes were found to be wrong: they are fetched again.

        Where the disk doesn't take the note, they are found to be wrong again after a restart.
        """
        entry = Entry(there=False, file=name, begin=begin, end=end)
        with self._lock:
            self._note(entry)
        with self._in_use() as usable:
            try:
                if usable:
                    self._record(entry)
            except OSError as error:
                self._stop(error)

    def note_all(self) -> None:
        """Note that every byte is there: the folder was whole until now.

        Raises:
            OSError: The disk can't.
        """
        for name in self._there:
            self._record(Entry(there=True, file=name, begin=0, end=self.record.files[name].size_bytes))

    def resume(self) -> None:
        """Try the disk again after a failure."""
        self._stopped_because = ""

    def finish_if_covered(self) -> None:
        """Put the folder into its place if all bytes are there, and nobody is about to; blocks."""
        with self._in_use() as usable:
            with self._lock:
                mine = usable and not (self._whole or self._finishing) and self._covered()
                self._finishing = self._finishing or mine
            if mine:
                self._finish()

    def close(self) -> None:
        """Give up the files, once what reads and writes them now has ended; the folder stays where it is."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._leave()

    @contextmanager
    def _in_use(self) -> Iterator[bool]:
        """Keep the descriptors open; False when they were given up before."""
        with self._lock:
            usable = not self._closed
            self._users += usable
        try:
            yield usable
        finally:
            if usable:
                with self._lock:
                    self._leave()

    def _leave(self) -> None:
        """Count a user less, itself being one until it is closed; the lock is held."""
        self._users -= 1
        if not self._users:
            self._journal.close()
            os.close(self._directory)

    def _write(self, name: str, chunks: Sequence[memoryview], offset: int, length: int) -> None:
        descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._directory)
        try:
            at = 0
            for chunk in chunks:
                piece = chunk[: length - at]
                done = 0
                while done < len(piece):
                    done += os.pwrite(descriptor, piece[done:], offset + at + done)
                at += len(piece)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def _record(self, entry: Entry) -> None:
        """Note an entry where a restart finds it, then here."""
        with self._lock:
            self._journal.append(entry)
            self._note(entry)

    def _note(self, entry: Entry) -> None:
        there, file = self._there.get(entry.file), self.record.files.get(entry.file)
        if there is None or file is None or entry.end > file.size_bytes:
            return
        change = there.add if entry.there else there.remove
        change(entry.begin, entry.end)

    def _covered(self) -> bool:
        files = self.record.files
        return all(there.covers(0, files[name].size_bytes) for name, there in self._there.items())

    def _finish(self) -> None:
        """Give the files their times and the folder its place; a crash in between leaves what can go on."""
        try:
            self._make_durable()
            if not self._take_place():
                return
            with suppress(FileNotFoundError):
                os.unlink(JOURNAL_NAME, dir_fd=self._directory)
            os.fsync(self._directory)
        except OSError as error:
            self._stop(error)
            return
        finally:
            with self._lock:
                self._finishing = False
        log.get().info(
            "checkpoint.cached",
            uri=self.record.uri,
            revision=self.record.revision,
            folder=str(self.folder),
            bytes=self.bytes_there(),
        )
        self._completed()

    def _make_durable(self) -> None:
        """Give weights their times, and have the small files survive a loss of power as the weights do."""
        for name in self._there:
            stamp = modified_ns(self.record.files[name])
            os.utime(name, ns=(stamp, stamp), dir_fd=self._directory)
        for name in {*self.record.files, RECORD_NAME} - self._there.keys():
            with suppress(FileNotFoundError):
                descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._directory)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        os.fsync(self._directory)

    def _take_place(self) -> bool:
        """Rename the folder, unless it was dropped, or bytes of it were found to be wrong meanwhile."""
        with self._lock:
            if self._closed or not self._covered():
                return False
            self.folder.rename(self._whole_folder)
            self.folder = self._whole_folder
            self._whole = True
            return True

    def _stop(self, error: OSError) -> None:
        with self._lock:
            told, self._stopped_because = self._stopped_because, error.strerror or str(error)
        if not told:
            metrics.LANDING_FAILURES.labels(reason="full" if error.errno in _FULL else "error").inc()
            log.get().warning(
                "landing.stopped",
                uri=self.record.uri,
                folder=str(self.folder),
                reason=self._stopped_because,
                action="the load goes on in memory; free space or lower STOKER_STORE_CACHE_BYTES",
            )


class PartialSource:
    """The bytes of one file that are on disk already; a `ChunkSource`."""

    def __init__(self, partial: PartialCheckpoint, name: str) -> None:
        """Args: partial: outlives this. name: of the file."""
        self._partial = partial
        self._name = name

    @property
    def name(self) -> str:
        """See `ChunkSource`."""
        return str(self._partial.folder / self._name)

    def read(self, chunk: memoryview, *, offset: int, length: int) -> list[ReadPart]:
        """See `ChunkSource`."""
        if not self._partial.has(self._name, offset, offset + length):
            raise NotHere("not there yet")
        began = time.monotonic()
        try:
            self._partial.read_into(self._name, chunk[:length], offset)
        except OSError as error:
            raise LoadFailed(f"{self.name} cannot be read: {error.strerror or error}") from error
        return [ReadPart(tier=DISK, byte_count=length, began_seconds=began, ended_seconds=time.monotonic())]

    def close(self) -> None:
        """See `ChunkSource`."""
