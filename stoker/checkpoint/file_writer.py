"""Write files front to back and digest them on the way."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Self

from stoker.checkpoint.digests import Digest
from stoker.errors import CheckpointInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

    from stoker.checkpoint.plan import FilePlan, PlannedEntry


class ChunkDigests:
    """One digest per chunk over a stream whose parts need not end where chunks do."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._left_bytes = chunk_bytes
        self._current = Digest()
        self._finished: list[str] = []

    def update(self, data: memoryview) -> None:
        """Take in the next bytes of the stream."""
        while data:
            part = data[: self._left_bytes]
            self._current.update(part)
            self._left_bytes -= len(part)
            data = data[len(part) :]
            if not self._left_bytes:
                self._finish()

    def finish(self) -> tuple[str, ...]:
        """Return all digests; the last chunk may be short."""
        if self._left_bytes < self._chunk_bytes:
            self._finish()
        return tuple(self._finished)

    def _finish(self) -> None:
        self._finished.append(self._current.text())
        self._current = Digest()
        self._left_bytes = self._chunk_bytes


class WeightsWriter:
    """A planned file under construction, written front to back; a context manager that closes it."""

    def __init__(self, path: Path, plan: FilePlan, *, chunk_bytes: int) -> None:
        """Create the file, which must not exist, with its header; takes its whole space on the disk."""
        self._path = path
        self._plan = plan
        self._digests = ChunkDigests(chunk_bytes)
        self.written_bytes = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            _reserve(self._descriptor, plan.size_bytes)
            self.write(memoryview(plan.header))
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        _write_all(self._descriptor, data)
        self._digests.update(data)
        self.written_bytes += len(data)

    def expect(self, offset: int) -> None:
        """Check that everything before `offset` is written.

        Raises:
            CheckpointInvalid: A tensor had more or fewer bytes than planned.
        """
        if self.written_bytes != offset:
            raise CheckpointInvalid(
                f"{self._path}: the source gave {self.written_bytes - offset:+,} bytes against its own table "
                f"before byte {offset:,}; it changed while it was read, convert again."
            )

    def finish(self) -> tuple[str, ...]:
        """Make the file durable and return its chunk digests.

        Raises:
            CheckpointInvalid: It is not complete.
        """
        self.expect(self._plan.size_bytes)
        os.fsync(self._descriptor)
        return self._digests.finish()


def write_weights(
    paths: Sequence[Path],
    plan: FilePlan,
    read: Callable[[str], Iterable[tuple[int | None, memoryview]]],
    *,
    chunk_bytes: int,
    progress: Callable[[int, int], None],
) -> tuple[tuple[str, ...], ...]:
    """Write the planned file for every rank, durably, in one pass; return each one's chunk digests; blocks.

    Args:
        paths: One for each rank; must not exist. All ranks' files have the same plan.
        plan: What to write.
        read: Yields the pieces of a tensor, by its name, each with its rank (None: every rank gets it), in
            each rank's order.
        chunk_bytes: What one digest covers.
        progress: Told the bytes written and the bytes to write, after each slice.

    Raises:
        CheckpointInvalid: A tensor had more or fewer bytes than planned.
        OSError: The disk refused.
    """
    total = plan.size_bytes * len(paths)
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(WeightsWriter(path, plan, chunk_bytes=chunk_bytes)) for path in paths]
        for entry in plan.entries:
            for writer in writers:
                writer.expect(entry.offset)
            for rank, part in _entry_parts(entry, read):
                for writer in writers if rank is None else (writers[rank],):
                    writer.write(part)
                progress(sum(writer.written_bytes for writer in writers), total)
        finished = tuple(writer.finish() for writer in writers)
        progress(total, total)
    return finished


def write_small(path: Path, data: bytes) -> None:
    """Write `data` durably to a path that must not exist; blocks."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _write_all(descriptor, memoryview(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry_parts(
    entry: PlannedEntry, read: Callable[[str], Iterable[tuple[int | None, memoryview]]]
) -> Iterable[tuple[int | None, memoryview]]:
    if entry.is_filler:
        return ((None, memoryview(bytes(entry.tensor.nbytes))),)
    return ((rank, part.cast("B")) for rank, part in read(entry.tensor.name))


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Take the whole space now, so that a disk without it refuses at once."""
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno not in {
            errno.EOPNOTSUPP,
            errno.EINVAL,
        }:  # where a file system cannot, writing will tell
            raise


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
