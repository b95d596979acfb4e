"""Prove that a checkpoint's bytes are those that were written.

A converted checkpoint is read completely and every digest compared; a damaged chunk is reported, not
raised, so that one run names all of them. In place there are no digests: only the structure is checked,
and the report says so.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.checkpoint.adapter import adapter_index, is_adapter
from stoker.checkpoint.digests import Digest, digest
from stoker.checkpoint.folder import open_regular, read_bounded, read_exactly, resolve_file, resolve_folder
from stoker.checkpoint.index import open_checkpoint, read_manifest, weights_path
from stoker.checkpoint.layout import MANIFEST_NAME
from stoker.checkpoint.small_files import MAX_SMALL_FILE_BYTES
from stoker.errors import CheckpointInvalid
from stoker.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from stoker.checkpoint.manifest import Manifest, SmallFile

MAX_THREADS = 8
SLICE_BYTES = 4 * MIB
"""What one thread holds of a chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadChunk:
    """A part of a file whose bytes are not those that were written.

    Attributes:
        file: Its name in the folder.
        offset: Where the part starts, in bytes.
        size_bytes: How long it is; a small file is one part.
        expected: The digest in `stoker.json`.
        found: The digest of what is there, or why it cannot be read.
    """

    file: str
    offset: int
    size_bytes: int
    expected: str
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        path: The folder, links resolved.
        revision: Of the checkpoint.
        digests_checked: False in place, where only the structure could be checked.
        chunks_checked: Digests compared, small files included.
        bytes_checked: Bytes read for them.
        bad: Everything that differs, by file and offset.
    """

    path: Path
    revision: str
    digests_checked: bool
    chunks_checked: int
    bytes_checked: int
    bad: tuple[BadChunk, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.bad


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A chunk to be checked."""

    file: str
    path: Path
    offset: int
    size_bytes: int
    expected: str


def verify(
    path: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    *,
    threads: int | None = None,
) -> VerifyReport:
    """Check the checkpoint in the folder `path`; blocks while it reads everything.

    Args:
        path: A converted checkpoint, safetensors in place, or a LoRA adapter.
        progress: Called after each slice with the bytes checked and the bytes to check, one call at a time.
        threads: Readers at once, each with a buffer of 4 MiB; default: the CPUs, at most `MAX_THREADS`.

    Raises:
        NotFound: There is no such folder.
        CheckpointInvalid: The structure is damaged: a file is missing or has another size, or
            `stoker.json` cannot be trusted.
    """
    folder = resolve_folder(path)
    if resolve_file(folder, MANIFEST_NAME) is None:
        index = adapter_index(folder) if is_adapter(folder) else open_checkpoint(folder)
        return VerifyReport(
            path=folder,
            revision=index.revision,
            digests_checked=False,
            chunks_checked=0,
            bytes_checked=0,
            bad=(),
        )
    manifest = read_manifest(folder)
    parts = list(_parts(folder, manifest))
    tally = _Tally(sum(part.size_bytes for part in parts), progress)
    with ThreadPoolExecutor(
        max_workers=threads or min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="verify"
    ) as pool:
        found = [bad for bad in pool.map(lambda part: _check(part, tally), parts) if bad is not None]
    found += [bad for small in manifest.small_files if (bad := _check_small(folder, small)) is not None]
    for rank in range(manifest.ranks) if not found else ():
        open_checkpoint(folder, rank=rank)
    return VerifyReport(
        path=folder,
        revision=manifest.revision,
        digests_checked=True,
        chunks_checked=len(parts) + len(manifest.small_files),
        bytes_checked=tally.total_bytes + sum(small.size_bytes for small in manifest.small_files),
        bad=tuple(found),
    )


class _Tally:
    """Counts bytes for all threads and tells the caller."""

    def __init__(self, total_bytes: int, progress: Callable[[int, int], None] | None) -> None:
        self.total_bytes = total_bytes
        self._done_bytes = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done_bytes += count
            if self._progress is not None:
                self._progress(self._done_bytes, self.total_bytes)


def _parts(folder: Path, manifest: Manifest) -> Iterable[_Part]:
    for file in manifest.files:
        path = weights_path(folder, file)
        for number, expected in enumerate(file.chunk_digests):
            offset = number * manifest.chunk_bytes
            size_bytes = min(manifest.chunk_bytes, file.size_bytes - offset)
            yield _Part(file=file.name, path=path, offset=offset, size_bytes=size_bytes, expected=expected)


def _check(part: _Part, tally: _Tally) -> BadChunk | None:
    state = Digest()
    view = memoryview(bytearray(min(SLICE_BYTES, part.size_bytes)))
    try:
        descriptor = open_regular(part.path)
        try:
            for begin in range(0, part.size_bytes, SLICE_BYTES):
                piece = view[: min(SLICE_BYTES, part.size_bytes - begin)]
                read_exactly(descriptor, piece, part.offset + begin, where=str(part.path))
                state.update(piece)
                tally.add(len(piece))
        finally:
            os.close(descriptor)
        found = state.text()
    except CheckpointInvalid as error:
        found = error.message
    if found == part.expected:
        return None
    return BadChunk(
        file=part.file, offset=part.offset, size_bytes=part.size_bytes, expected=part.expected, found=found
    )


def _check_small(folder: Path, small: SmallFile) -> BadChunk | None:
    try:
        path = resolve_file(folder, small.name)
        found = (
            "the file is missing"
            if path is None
            else digest(read_bounded(path, limit_bytes=MAX_SMALL_FILE_BYTES))
        )
    except CheckpointInvalid as error:
        found = error.message
    if found == small.digest:
        return None
    return BadChunk(
        file=small.name, offset=0, size_bytes=small.size_bytes, expected=small.digest, found=found
    )
