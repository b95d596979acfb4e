"""Shared memory on the largest pages this host gives: a ladder of four rungs, tried from the top.

1. hugetlb memfd: pages the operator reserved (`vm.nr_hugepages`); ENOMEM when short.
2. tmpfs with `huge=`: one that is mounted, or, when the settings say so, a detached one that this process
   makes for itself (fsopen/fsmount: no mount point, nothing left behind).
3. memfd with MADV_HUGEPAGE: silently stays at 4 KiB when `shmem_enabled` says so.
4. memfd as it comes.

What a rung promises is not what the kernel gives: `Arena` measures that afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.store.settings import HugeTmpfs
from stoker import log
from stoker.attach.memory import HUGE_PAGE_BYTES, Access, MappedRange
from stoker.errors import ConfigError, StokerError
from stoker.units import format_bytes

_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432  # the same on every architecture
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6
_MFD_NOEXEC_SEAL = 0x0008
_PRESENT_AT_LEAST = 0.9
_MADE_HUGE = frozenset({"tmpfs_huge", "memfd_huge"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory:
    """Memory that can be handed to other processes.

    Attributes:
        descriptor: Readable and writable; owned by whoever holds this.
        memory: The daemon's own mapping of all of it.
        backing: Which rung: `hugetlb`, `tmpfs_huge`, `memfd_huge` or `memfd`.
    """

    descriptor: int
    memory: MappedRange
    backing: str

    def read_only_descriptor(self) -> int:
        """Return a descriptor that cannot change the memory, for others; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def open_shared_memory(
    length: int, *, chunk_bytes: int, huge_tmpfs_dir: Path | None, huge_tmpfs: HugeTmpfs
) -> SharedMemory:
    """Return `length` bytes on the first rung that holds; takes addresses, no memory yet (but on hugetlb).

    Args:
        length: Whole chunks.
        chunk_bytes: Huge pages are tried only when a chunk is made of whole ones.
        huge_tmpfs_dir: A folder on a tmpfs with huge pages; None = look whether /dev/shm is one.
        huge_tmpfs: Whether a detached one may be made.

    Raises:
        ConfigError: The folder was given and cannot be used, or no shared memory can be had at all.
    """
    huge_possible = chunk_bytes % HUGE_PAGE_BYTES == 0
    if huge_possible:
        rungs: tuple[tuple[str, Callable[[], int]], ...] = (
            ("hugetlb", lambda: _memfd(length, os.MFD_HUGETLB)),
            ("tmpfs_huge", lambda: _mounted_tmpfs(length, huge_tmpfs_dir)),
            ("tmpfs_huge", lambda: _detached_tmpfs(length, huge_tmpfs)),
        )
        for backing, make in rungs:
            with suppress(_NotOffered):
                return _mapped(make(), length, backing)
    try:
        return _mapped(_memfd(length, 0), length, "memfd_huge" if huge_possible else "memfd")
    except _NotOffered as error:
        raise ConfigError(
            f"no shared memory of {format_bytes(length)} can be had: {error}; set a smaller pool_bytes"
        ) from error


class _NotOffered(Exception):
    """This rung does not hold here."""


def _mapped(descriptor: int, length: int, backing: str) -> SharedMemory:
    """Map it; where huge pages are made of free memory, make the kernel compact memory for them.

    A tmpfs mounted `huge=` takes huge pages that lie about, but only MADV_HUGEPAGE lets a page fault wait for
    compaction (`transparent_hugepage/defrag` is `madvise` by default). Without it a host whose memory is full
    of page cache gave a pool of 3 GB mostly small pages.
    """
    memory = MappedRange(length)
    try:
        memory.map(0, descriptor, 0, length, Access.shared)
    except StokerError as error:  # hugetlb: the reservation is made here
        os.close(descriptor)
        raise _NotOffered(error.message) from error
    if backing in _MADE_HUGE and not memory.advise_huge() and backing == "memfd_huge":
        backing = "memfd"
    return SharedMemory(descriptor=descriptor, memory=memory, backing=backing)


def _memfd(length: int, flags: int) -> int:
    sealing = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags
    try:
        try:
            descriptor = os.memfd_create("stoker-pool", sealing | _MFD_NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            descriptor = os.memfd_create("stoker-pool", sealing)  # before Linux 6.3
    except OSError as error:
        raise _NotOffered(str(error)) from error
    try:
        os.ftruncate(descriptor, length)
        fcntl.fcntl(
            descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
    except OSError as error:
        os.close(descriptor)
        raise _NotOffered(str(error)) from error
    return descriptor


def _mounted_tmpfs(length: int, folder: Path | None) -> int:
    chosen = folder or Path("/dev/shm")  # noqa: S108 - where tmpfs is mounted, not a file of ours
    options = _tmpfs_options(chosen)
    huge = any(option in ("huge=always", "huge=within_size") for option in options)
    try:
        _require(huge, f"{chosen} is no tmpfs mounted huge=always or huge=within_size")
        return _unnamed_file(os.open(chosen, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), length)
    except (_NotOffered, OSError) as error:
        if folder is not None:
            raise ConfigError(
                f"huge_tmpfs_dir {folder} cannot hold the pool: {error}; "
                f"mount -t tmpfs -o huge=within_size,size={length} none {folder}"
            ) from error
        raise _NotOffered(str(error)) from error


def _require(held: bool, otherwise: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not held:
        raise _NotOffered(otherwise)


def _tmpfs_options(folder: Path) -> tuple[str, ...]:
    """Return the mount options of the tmpfs that is mounted exactly there; nothing when there is none."""
    found: tuple[str, ...] = ()
    for _, where, kind, options in _mounts():
        if Path(where) == folder:
            found = tuple(options.split(",")) if kind == "tmpfs" else ()
    return found


def _mounts() -> Iterator[tuple[str, str, str, str]]:
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines():
            device, where, kind, options, *_ = line.split()
            yield device, where, kind, options


def _detached_tmpfs(length: int, wanted: HugeTmpfs) -> int:
    if wanted is not HugeTmpfs.PRIVATE:
        raise _NotOffered("not wanted")
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: object) -> int:
        result = libc.syscall(number, *arguments)
        if result < 0:
            code = ctypes.get_errno()
            log.get().info("pool.huge_tmpfs_refused", reason=os.strerror(code))
            raise _NotOffered(os.strerror(code))
        return int(result)

    context = call(_SYS_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC)
    try:
        for key, value in ((b"huge", b"within_size"), (b"size", str(length).encode())):
            call(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, key, value, 0)
        call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = call(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        return _unnamed_file(mount, length)
    except OSError as error:
        raise _NotOffered(str(error)) from error


def _unnamed_file(folder: int, length: int) -> int:
    """Return a file of `length` bytes without a name in `folder`, which is closed."""
    try:
        descriptor = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        os.ftruncate(descriptor, length)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def measured_page_bytes(memory: MappedRange) -> int:
    """Return the page size that the kernel really used for the pages present in `memory`.

    Reads /proc/self/smaps: `KernelPageSize` tells of hugetlb, `*PmdMapped` of transparent huge pages. Walks
    the mapping's page table, so it takes about 10 ms per GiB of 4 KiB pages.
    """
    fields = smaps_fields(Path("/proc/self/smaps").read_text(errors="replace"), memory.address)
    page_bytes = fields.get("KernelPageSize", 4096)
    huge_bytes = fields.get("ShmemPmdMapped", 0) + fields.get("FilePmdMapped", 0)
    present_bytes = fields.get("Rss", 0)
    if present_bytes and huge_bytes >= _PRESENT_AT_LEAST * present_bytes:
        return max(page_bytes, HUGE_PAGE_BYTES)
    return page_bytes


def smaps_fields(text: str, address: int) -> dict[str, int]:
    """Return the fields in bytes of the mapping in `text` that starts at `address`; pure."""
    fields: dict[str, int] = {}
    inside = False
    for line in text.splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            start = first.partition("-")[0]
            if inside:
                break
            inside = start.lower().lstrip("0") == f"{address:x}"
        elif inside and rest.strip().endswith(" kB"):
            fields[first.removesuffix(":")] = int(rest.split()[0]) * 1024
    return fields
