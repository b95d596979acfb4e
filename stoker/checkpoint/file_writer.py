"""Write files front to back and digest them on the way."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from stoker.checkpoint.digests import Digest
from stoker.errors import CheckpointInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from stoker.checkpoint.plan import FilePlan


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


def write_weights(
    path: Path,
    plan: FilePlan,
    read: Callable[[str], Iterable[memoryview]],
    *,
    chunk_bytes: int,
    progress: Callable[[int, int], None],
) -> tuple[str, ...]:
    """Write the planned file durably and return its chunk digests; blocks.

    Args:
        path: Must not exist.
        plan: What to write.
        read: Yields a tensor's bytes in order, by its name.
        chunk_bytes: What one digest covers.
        progress: Told the bytes written and the bytes to write, after each slice.

    Raises:
        CheckpointInvalid: A tensor had more or fewer bytes than planned.
        OSError: The disk refused.
    """
    chunk_digests = ChunkDigests(chunk_bytes)
    written = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _reserve(descriptor, plan.size_bytes)
        for offset, parts in _stream(plan, read):
            if written != offset:
                raise CheckpointInvalid(
                    f"{path}: the source gave {written - offset:+,} bytes against its own table before byte "
                    f"{offset:,}; it changed while it was read, convert again."
                )
            for part in parts:
                _write_all(descriptor, part)
                chunk_digests.update(part)
                written += len(part)
                progress(written, plan.size_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return chunk_digests.finish()


def write_small(path: Path, data: bytes) -> None:
    """Write `data` durably to a path that must not exist; blocks."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _write_all(descriptor, memoryview(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stream(
    plan: FilePlan, read: Callable[[str], Iterable[memoryview]]
) -> Iterable[tuple[int, Iterable[memoryview]]]:
    """Yield offset and bytes of the header, of every entry, and of nothing at the file's end."""
    yield 0, (memoryview(plan.header),)
    for entry in plan.entries:
        if entry.is_filler:
            yield entry.offset, (memoryview(bytes(entry.tensor.nbytes)),)
        else:
            yield entry.offset, (part.cast("B") for part in read(entry.tensor.name))
    yield plan.size_bytes, ()


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
