"""The bytes of local weights files in this process's memory, the cheapest way for fresh memory.

A file is mapped, privately and copy-on-write, and its pages are brought in with MADV_POPULATE_READ, several
pieces at once where they are not in the page cache. Nothing is copied or zeroed: that takes a tenth of the
CPU time of direct reads into new memory, which pay for that memory's first touch (docs/decisions, "The
library maps files"). Where mapping cannot do it (a kernel before 5.14, a disk that fails) the file is read
into memory on huge pages, and the reader says what is wrong with the disk or the file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.attach.memory import HUGE_PAGE_BYTES, Access, MappedRange
from stoker.checkpoint.folder import open_regular
from stoker.checkpoint.reading import DIRECT_ALIGNMENT_BYTES, FileSignature, SourceFile
from stoker.errors import CheckpointInvalid, DoesNotFit, LoadFailed
from stoker.loader.file_check import FileCheck
from stoker.units import MIB, align_up, format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stoker.checkpoint.index import CheckpointFile

CHUNK_BYTES = 16 * MIB
"""What one thread reads at a time: from here on Python's share of the work is lost in the kernel's."""

POPULATE_BYTES = 64 * MIB
"""What one thread brings in at a time of a file that is not in the page cache: several keep a disk busy also
where the kernel reads ahead little."""

MAX_THREADS = 4
"""Pieces or readers at once; more gained nothing on any disk measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileMemory:
    """One weights file in memory.

    Attributes:
        data: All of its bytes; writing to them changes this process's copy only.
        bytes_read: Bytes copied to get them here; 0 where the page cache's own pages are mapped.
        mapping: The mapping of a mapped file.
    """

    data: memoryview
    bytes_read: int
    mapping: MappedRange | None = None


def map_file(file: CheckpointFile) -> FileMemory:
    """Map a file: its bytes come from the page cache or the disk when they are touched.

    As with every mapped file, cutting the file while it is in use kills the process.

    Raises:
        CheckpointInvalid: It cannot be opened, or has another size than its header says.
    """
    descriptor = open_regular(file.path)
    try:
        size = os.fstat(descriptor).st_size
        if size != file.size_bytes:
            raise _changed(file, size)
        if not size:
            return FileMemory(data=memoryview(b""), bytes_read=0)
        memory = MappedRange(size)
        memory.map(0, descriptor, 0, memory.length, Access.copy_on_write)
    finally:
        os.close(descriptor)
    return FileMemory(data=memory.view(0, size), bytes_read=0, mapping=memory)


def load_files(
    files: Sequence[CheckpointFile], *, check: FileCheck | None = None, threads: int | None = None
) -> list[FileMemory]:
    """Bring whole files into memory; blocks until the last byte is there.

    Args:
        files: From one index.
        check: How they are compared with their digests, each piece as soon as it is there; None = not.
        threads: Pieces brought in at once; default `MAX_THREADS`.

    Raises:
        LoadFailed: A file is gone, was cut or changed, or the disk can't read it.
        CheckpointInvalid: A file has another size than its header says, or other bytes than its digests.
        DoesNotFit: There is not enough memory.
    """
    check = check or FileCheck()
    signatures = [_signature(file) for file in files]
    mapped = {
        file.name: memory for file in files if (memory := _populated(file, check, threads or MAX_THREADS))
    }
    for file, signature in zip(files, signatures, strict=True):
        if file.name in mapped and _signature(file) != signature:
            raise LoadFailed(
                f"{file.path} was changed while it was loaded; try again when its writer is done"
            )
    rest = [file for file in files if file.name not in mapped]
    read = dict(zip((file.name for file in rest), _read(rest, threads), strict=True)) if rest else {}
    for file in rest:
        if check.is_wanted(file, cached=False):
            check.check(file, read[file.name].data, 0, file.size_bytes)
    return [mapped.get(file.name) or read[file.name] for file in files]


def _populated(file: CheckpointFile, check: FileCheck, threads: int) -> FileMemory | None:
    """Return the file mapped with every page present, and checked; None where this kernel or disk can't."""
    memory = map_file(file)
    mapping = memory.mapping
    if mapping is None:
        return memory
    cached = is_cached(file)
    is_checked = check.is_wanted(file, cached=cached)
    piece = mapping.length if cached else POPULATE_BYTES
    if is_checked:
        piece = align_up(POPULATE_BYTES, check.chunk_bytes)

    def bring(at: int) -> bool:
        if not mapping.fault_in(at, min(piece, mapping.length - at), write=False):
            return False
        if is_checked:
            check.check(file, memory.data, at, min(at + piece, file.size_bytes))
        return True

    with ThreadPoolExecutor(threads, thread_name_prefix="stoker-map") as pool:
        done = list(pool.map(bring, range(0, mapping.length, piece)))
    return memory if all(done) else None


def is_cached(file: CheckpointFile) -> bool:
    """Say whether the file is in the page cache, judged by the first block of each chunk; never waits."""
    descriptor = open_regular(file.path)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # a probe must not cause reading ahead
        block = [bytearray(DIRECT_ALIGNMENT_BYTES)]
        last = max(0, file.size_bytes - DIRECT_ALIGNMENT_BYTES)
        for offset in (*range(0, file.size_bytes, CHUNK_BYTES), last):
            if not os.preadv(descriptor, block, offset, os.RWF_NOWAIT):
                return False
    except OSError:  # EAGAIN: not there; others: this file system cannot tell
        return False
    finally:
        os.close(descriptor)
    return True


def _read(files: Sequence[CheckpointFile], threads: int | None) -> list[FileMemory]:
    memories = [_huge_memory(file) for file in files]
    sources = [SourceFile(file.path, _signature(file)) for file in files]
    chunks = [
        (source, memory[offset : offset + align_up(length, DIRECT_ALIGNMENT_BYTES)], offset, length)
        for file, memory, source in zip(files, memories, sources, strict=True)
        for offset, length in _chunks(file.size_bytes)
    ]
    workers = threads or min(MAX_THREADS, os.cpu_count() or 1)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="stoker-read") as pool:
            pending = [
                pool.submit(source.read, memory, offset=offset, length=length)
                for source, memory, offset, length in chunks
            ]
            try:
                for future in pending:
                    future.result()
            finally:
                for future in pending:
                    future.cancel()
    finally:
        for source in sources:
            source.close()
    return [
        FileMemory(data=memory[: file.size_bytes], bytes_read=file.size_bytes)
        for file, memory in zip(files, memories, strict=True)
    ]


def _signature(file: CheckpointFile) -> FileSignature:
    try:
        signature = FileSignature.of(file.path.stat())
    except OSError as error:
        raise LoadFailed(f"{file.path} cannot be read: {error.strerror}; restore the file") from error
    if signature.size_bytes != file.size_bytes:
        raise _changed(file, signature.size_bytes)
    return signature


def _changed(file: CheckpointFile, size: int) -> CheckpointInvalid:
    return CheckpointInvalid(
        f"{file.path} has {size:,} bytes and had {file.size_bytes:,} when its header was read; "
        "try again when whoever writes it is done"
    )


def _chunks(size_bytes: int) -> list[tuple[int, int]]:
    return [(offset, min(CHUNK_BYTES, size_bytes - offset)) for offset in range(0, size_bytes, CHUNK_BYTES)]


def _huge_memory(file: CheckpointFile) -> memoryview:
    """Return fresh memory with room for the file in whole blocks, on huge pages where the host gives them."""
    length = align_up(max(file.size_bytes, 1), HUGE_PAGE_BYTES)
    try:
        memory = mmap.mmap(-1, length + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise DoesNotFit(
            f"{file.path} needs {format_bytes(file.size_bytes)} of memory, which this host does not give: "
            f"{error.strerror}"
        ) from error
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = align_up(address, HUGE_PAGE_BYTES) - address
    return memoryview(memory)[start : start + length]
