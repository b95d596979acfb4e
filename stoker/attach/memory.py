"""Virtual memory by hand: ranges reserved at an alignment, pieces of a descriptor mapped into them.

Python's `mmap` can neither choose an address nor hand the mapping's lifetime to its views; ctypes can.
A range is unmapped when nothing refers to it any more, never before: a view that outlived its mapping
would be a crash.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from enum import Enum

from stoker.errors import StokerError
from stoker.units import MIB, align_up, format_bytes

HUGE_PAGE_BYTES = 2 * MIB
"""Ranges start on this boundary, or the kernel could not map huge pages into them."""

_MAP_FIXED = 0x10  # linux/mman.h, the same on x86 and ARM
_MAP_NORESERVE = 0x4000
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Access(Enum):
    """How a piece is mapped: protection and flags of mmap(2)."""

    shared = (mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED)
    """Writes reach everyone: the daemon's own mapping."""

    copy_on_write = (mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_NORESERVE)
    """Reads see what the daemon writes, also later; the first write to a page makes a private copy of it.

    NORESERVE: nobody writes, so no memory (nor, on hugetlb, a second set of huge pages) is set aside for it.
    """

    read_only = (mmap.PROT_READ, mmap.MAP_SHARED)


class MappedRange:
    """A contiguous range of this process's addresses; reserved at first, readable where `map` filled it.

    Attributes:
        address: Where it starts; a multiple of `HUGE_PAGE_BYTES`.
        length: Bytes, whole pages.
        keeps: What must live as long as the range does, e.g. the lease on what is mapped.
    """

    __slots__ = ("__weakref__", "address", "keeps", "length")

    def __init__(self, length: int, *, keeps: object = None) -> None:
        """Reserve `length` bytes (rounded up to pages); takes addresses, no memory.

        Raises:
            StokerError: The address space is exhausted (`ulimit -v`).
        """
        self.length = max(align_up(length, mmap.PAGESIZE), mmap.PAGESIZE)
        self.keeps = keeps
        with_slack = self.length + HUGE_PAGE_BYTES
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        raw = _mmap(None, with_slack, 0, flags, -1, 0)
        self.address = align_up(raw, HUGE_PAGE_BYTES)
        if self.address > raw:
            _libc.munmap(raw, self.address - raw)
        tail = raw + with_slack - (self.address + self.length)
        if tail:
            _libc.munmap(self.address + self.length, tail)
        release = weakref.finalize(self, _libc.munmap, self.address, self.length)
        release.atexit = False  # views may still be read while the interpreter ends; the kernel unmaps

    def map(self, at: int, descriptor: int, offset: int, length: int, access: Access) -> None:
        """Put `length` bytes of a file at `at` bytes into the range, over what was there.

        Args:
            at: Where in the range, whole pages.
            descriptor: The file; may be closed afterwards.
            offset: Where in the file, whole pages.
            length: Whole pages.
            access: How.
        """
        if at < 0 or length <= 0 or at + length > self.length:
            raise ValueError(f"{at}+{length} does not lie in a range of {self.length} bytes")
        protection, flags = access.value
        _mmap(self.address + at, length, protection, flags | _MAP_FIXED, descriptor, offset)

    def advise_huge(self) -> bool:
        """Ask for huge pages; False when this kernel knows none."""
        return bool(_libc.madvise(self.address, self.length, _MADV_HUGEPAGE) == 0)

    def fault_in(self, at: int, length: int, *, write: bool) -> bool:
        """Make the pages present, so that no later access has to wait for them; blocks without the GIL.

        Args:
            at: Where in the range, whole pages.
            length: Whole pages.
            write: Allocate what is missing, writable; otherwise only map what exists.

        Returns:
            False when the kernel can't (before Linux 5.14) or memory ran out; nothing is broken then.
        """
        advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
        return bool(_libc.madvise(self.address + at, length, advice) == 0)

    def view(self, at: int, length: int) -> memoryview:
        """Return bytes of the range, writable; the range lives at least as long as the view."""
        if at < 0 or length < 0 or at + length > self.length:
            raise ValueError(f"{at}+{length} does not lie in a range of {self.length} bytes")
        array = (ctypes.c_ubyte * length).from_address(self.address + at)
        array.owner = self  # type: ignore[attr-defined]  # ctypes arrays take attributes; typeshed omits it
        return memoryview(array).cast("B")


def _mmap(  # noqa: PLR0913, PLR0917 - mmap(2)
    address: int | None, length: int, protection: int, flags: int, descriptor: int, offset: int
) -> int:
    got = _libc.mmap(address, length, protection, flags, descriptor, offset)
    if got is None or got == _MAP_FAILED:
        errno = ctypes.get_errno()
        raise StokerError(
            f"mapping {format_bytes(length)} failed: {os.strerror(errno)}; "
            "check `ulimit -v`, vm.max_map_count and free memory",
            details={"errno": errno},
        )
    return int(got)
