"""What a chunk can be filled from: a file on disk, a peer's store, an origin far away, or several in turn.

Reader threads call sources, so they block and hold no state of the event loop. A source promises that the
bytes are those of the revision that was asked for, or raises; it never returns a chunk that is half filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeGuard

from stoker.checkpoint.reading import ReadPart


class ChunkSource(Protocol):
    """One weights file, from wherever its bytes come."""

    @property
    def name(self) -> str:
        """For people: a path, an address, a uri."""

    def read(self, chunk: memoryview, *, offset: int, length: int) -> list[ReadPart]:
        """Fill the first `length` bytes of `chunk` from `offset` of the file; blocks.

        Args:
            chunk: Memory aligned to 4096 bytes; may be written beyond `length`, up to its end.
            offset: A multiple of the chunk's size.
            length: Bytes wanted; less than a chunk at the end of the file.

        Returns:
            What came from which tier, and when.

        Raises:
            LoadFailed: The bytes cannot be had from here; says why and what to do.
        """

    def close(self) -> None:
        """Give up files and connections; no read is running. Idempotent."""


class RunSource(ChunkSource, Protocol):
    """A source that fills neighbouring chunks in one go, because one digest may cover several."""

    def read_run(self, chunks: Sequence[memoryview], *, offset: int, length: int) -> list[ReadPart]:
        """Fill chunks, all of one size, from `offset` of the file with `length` bytes; else as `read`."""


class GradualSource(ChunkSource, Protocol):
    """A source that tells how far it is, so that others can have bytes of a chunk before it is whole."""

    def read_gradually(
        self, chunk: memoryview, *, offset: int, length: int, told: Callable[[int], None] | None
    ) -> list[ReadPart]:
        """As `read`; fills from the first byte on, and tells `told` how many bytes are there."""


def reads_runs(source: ChunkSource) -> TypeGuard[RunSource]:
    """Tell whether a source fills neighbouring chunks in one go.

    By its attribute: `isinstance` of a protocol takes some 50 microseconds, and this is asked at every read.
    """
    return hasattr(source, "read_run")


def reads_gradually(source: ChunkSource) -> TypeGuard[GradualSource]:
    """Tell whether a source says how far it is."""
    return hasattr(source, "read_gradually")


def fill_run(
    source: ChunkSource, chunks: Sequence[memoryview], *, offset: int, length: int
) -> list[ReadPart]:
    """Fill neighbouring chunks, all of one size, from any source; blocks.

    Raises:
        LoadFailed: As `ChunkSource.read`.
    """
    if reads_runs(source):
        return source.read_run(chunks, offset=offset, length=length)
    parts: list[ReadPart] = []
    for number, chunk in enumerate(chunks):
        at = number * len(chunk)
        parts += source.read(chunk, offset=offset + at, length=min(len(chunk), length - at))
    return parts
