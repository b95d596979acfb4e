"""A checkpoint in the store's memory, mapped into this process: one contiguous range per file.

The mapping is private and copy-on-write. Reads see what the daemon's disk reads put there, also after the
mapping was made; a stray in-place write copies that one page for this process instead of killing it
(read-only pages would: SIGSEGV) or changing the weights of every other replica on the host (a shared
mapping would). The descriptor itself was opened read-only by the store, so not even a bug can write through.

Lifetime: buffers and tensors hold the mapping, and the mapping holds the lease. `close` gives up this
object's own share; the memory is unmapped and the lease ends when the last view is gone, so that no view
ever shows another checkpoint's bytes.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Self

from stoker.attach.columns import tensors_of
from stoker.attach.connection import Connection, failure
from stoker.attach.memory import Access, MappedRange
from stoker.errors import DeadlineExceeded, InvalidRequest, LoadFailed, StokerError
from stoker.v1 import checkpoint_store_pb2 as pb
from stoker.v1 import model_pb2, start_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachTimings:
    """Seconds of the steps of an attach."""

    connect_seconds: float
    reply_seconds: float
    map_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """How the whole checkpoint came to be in memory.

    Attributes:
        transfers: Bytes and busy seconds per tier.
        seconds: From the request to the last chunk.
    """

    transfers: tuple[start_pb2.TierTransfer, ...]
    seconds: float


class _File:
    """One file's mapping and how much of it is ready."""

    __slots__ = ("memory", "name", "ready_index", "runs", "size_bytes")

    def __init__(self, described: pb.AttachedFile, chunk_bytes: int, arena: int, lease: Connection) -> None:
        """Map one contiguous range that shows the file's chunks, one mapping per run of neighbours."""
        self.runs = runs(tuple(described.chunk_offsets), chunk_bytes)
        self.name = described.name
        self.size_bytes = described.bytes
        self.ready_index = described.ready_counter_offset // 8
        self.memory = MappedRange(len(described.chunk_offsets) * chunk_bytes, keeps=lease)
        for run in self.runs:
            self.memory.map(run.at, arena, run.offset, run.length, Access.copy_on_write)


class Attachment:
    """A leased checkpoint. Made by `attach`; methods may be called from several threads.

    Attributes:
        checkpoint: What it is.
        tensors: Every stored tensor by name, in execution order.
        tied: Names that share a stored tensor; the first of each group is the stored one.
        small_files: `config.json` and `generation_config.json`, where they exist.
        tier: Best tier that held all of it when asked.
        timings: What attaching cost.
        arena: Which memory it lies in; see `stoker.attach.pool`.
        window_bytes: How much of it is there at a time, where it is larger than the pool; None: all of it
            stays. In a window bytes must be copied away in the order of the files and `consumed`.
    """

    def __init__(
        self,
        connection: Connection,
        attached: pb.Attached,
        descriptors: Sequence[int],
        *,
        connect_seconds: float,
        reply_seconds: float,
    ) -> None:
        """Map everything; takes over the connection, not the descriptors."""
        began = time.monotonic()
        arena, counters = descriptors
        self.checkpoint: model_pb2.CheckpointInfo = attached.checkpoint
        self.tensors = tensors_of(attached)
        self.tied = tuple(tuple(group.names) for group in attached.tied)
        self.small_files = {file.name: file.content for file in attached.small_files}
        self.tier = attached.tier
        status = os.fstat(arena)
        self.arena = (status.st_dev, status.st_ino)
        self.window_bytes = attached.window_bytes or None
        self._connection: Connection | None = connection
        self._counters = mmap.mmap(counters, os.fstat(counters).st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        self._ready = memoryview(self._counters).cast("Q")
        self._files: tuple[_File, ...] = tuple(
            _File(file, attached.chunk_bytes, arena, connection) for file in attached.files
        )
        self._receiving = threading.Lock()
        self._loaded: Loaded | None = None
        self._failed: StokerError | None = None
        self.timings = AttachTimings(
            connect_seconds=connect_seconds,
            reply_seconds=reply_seconds,
            map_seconds=time.monotonic() - began,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def file_count(self) -> int:
        """Number of weights files."""
        return len(self._files)

    def file_name(self, file: int) -> str:
        """Return a file's name in the checkpoint's folder."""
        return self._files[file].name

    def file_bytes(self, file: int) -> int:
        """Return a file's whole size, header included."""
        return self._files[file].size_bytes

    def address(self, file: int) -> int:
        """Return where a file's first byte is in this process; valid while a buffer of it lives."""
        return self._files[file].memory.address

    def buffer(self, file: int, offset: int = 0, length: int | None = None) -> memoryview:
        """Return bytes of a file without copying; ready only as far as `ready_bytes` says.

        The view holds the mapping and the lease. Writing to it changes this process's copy only.
        """
        held = self._files[file]
        count = held.size_bytes - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > held.size_bytes:
            raise InvalidRequest(f"{held.name} has {held.size_bytes} bytes; {offset}+{count} is outside")
        return held.memory.view(offset, count)

    def places(self, file: int, start: int, end: int) -> list[tuple[int, int]]:
        """Return where bytes of a file lie in the store's arena: offset and length of each piece."""
        held = self._files[file]
        if not 0 <= start <= end <= held.size_bytes:
            raise InvalidRequest(f"{held.name} has {held.size_bytes} bytes; {start} to {end} is outside")
        found = []
        for run in held.runs:
            first, last = max(start, run.at), min(end, run.at + run.length)
            if first < last:
                found.append((run.offset + first - run.at, last - first))
        return found

    def ready_bytes(self, file: int) -> int:
        """Return how many bytes of a file, counted from its start, have arrived. Never blocks."""
        return self._ready[self._files[file].ready_index]

    def wait_ready(self, file: int, upto_bytes: int, *, timeout_seconds: float | None = None) -> None:
        """Return when the first `upto_bytes` of a file are there; at once when they already are.

        Raises:
            LoadFailed: The load failed, with the store's reason, or the store went away during it.
            DeadlineExceeded: Not within the time given; waiting again is fine.
        """
        if self._failed is None and self.ready_bytes(file) >= upto_bytes:
            return
        if upto_bytes > self._files[file].size_bytes:
            raise InvalidRequest(f"{self._files[file].name} has fewer than {upto_bytes} bytes")
        self._receive(lambda: self.ready_bytes(file) >= upto_bytes, timeout_seconds)

    def wait_tensor(self, name: str, *, timeout_seconds: float | None = None) -> None:
        """Return when a tensor is complete; raises as `wait_ready` does."""
        tensor = self.tensors[name]
        upto_bytes = tensor.offset + tensor.nbytes
        if self._failed is not None or self._ready[self._files[tensor.file].ready_index] < upto_bytes:
            self.wait_ready(tensor.file, upto_bytes, timeout_seconds=timeout_seconds)

    def wait_all(self, *, timeout_seconds: float | None = None) -> Loaded:
        """Return when everything is there and checked, and how it came; raises as `wait_ready` does."""
        self._receive(lambda: self._loaded is not None, timeout_seconds)
        if self._loaded is None:
            raise StokerError("the load ended without a result")
        return self._loaded

    def consumed(self, file: int, upto_bytes: int) -> None:
        """Give up bytes of a window, from the start of a file: others come into their place.

        Outside a window it does nothing. Files are given up in their order, each to its end; the next ones
        come only then.

        Raises:
            PeerError: The store went away.
        """
        connection = self._connection
        if self.window_bytes is not None and connection is not None:
            connection.tell(pb.AttachConsumed(file=file, bytes=upto_bytes))

    def map_pages(self, file: int, start: int = 0, end: int | None = None) -> None:
        """Enter ready pages into this process's page table in one go, ahead of the first touch.

        Worth it before the first forward pass on 4 KiB pages; blocks without the GIL.

        Args:
            file: Which one.
            start: First byte; its whole page is meant.
            end: Byte after the last one; pages not wholly ready are left out. None: all that is ready.
        """
        ready = self.ready_bytes(file)
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        length = (ready if end is None else min(end, ready)) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            self._files[file].memory.fault_in(first, length, write=False)

    def close(self) -> None:
        """Give up this object's share of the mapping and of the lease; idempotent.

        Memory is unmapped and the lease ends here, or when the last buffer or tensor made from it is gone.
        """
        self._failed = self._failed or LoadFailed("the attachment was closed")
        self._files = ()
        self._connection = None

    def _receive(self, satisfied: Callable[[], bool], timeout_seconds: float | None) -> None:
        """Take messages until `satisfied`; one thread receives at a time, the others look when it is done."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        if not self._receiving.acquire(timeout=-1 if timeout_seconds is None else max(0.0, timeout_seconds)):
            raise DeadlineExceeded(f"{self.checkpoint.uri} was not loaded within {timeout_seconds} s")
        try:
            while True:
                if self._failed is not None:
                    raise self._failed
                if satisfied():
                    return
                self._take_event(None if deadline is None else max(0.0, deadline - time.monotonic()))
        finally:
            self._receiving.release()

    def _take_event(self, timeout_seconds: float | None) -> None:
        connection = self._connection
        if connection is None:
            return  # closed meanwhile: `_failed` says so
        try:
            event = connection.next_event(timeout_seconds=timeout_seconds)
        except DeadlineExceeded:
            raise
        except StokerError as error:
            self._failed = error
            return
        match event.WhichOneof("event"):
            case "failed":
                self._failed = failure(event.failed)
            case "done":
                self._loaded = Loaded(transfers=tuple(event.done.transfers), seconds=event.done.seconds)
            case _:
                pass  # a file got further: its counter says how far


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring chunks: `length` bytes at `offset` of the arena that belong at `at` of the file."""

    at: int
    offset: int
    length: int


def runs(chunk_offsets: Sequence[int], chunk_bytes: int) -> list[Run]:
    """Return the fewest pieces that lay the chunks out in order."""
    starts = [
        index
        for index, offset in enumerate(chunk_offsets)
        if index == 0 or chunk_offsets[index - 1] + chunk_bytes != offset
    ]
    return [
        Run(at=start * chunk_bytes, offset=chunk_offsets[start], length=(end - start) * chunk_bytes)
        for start, end in pairwise([*starts, len(chunk_offsets)])
    ]
