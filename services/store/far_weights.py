"""How the weights of one file are brought into the pool: what a load needs to know of it. Values only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.store.reading.chunk_source import ChunkSource
from services.store.reading.lanes import Lane
from stoker.checkpoint.index import CheckpointFile

Land = Callable[[Sequence[memoryview], int, int], None]
"""Writes chunks to the host's disk: chunks, offset in the file, bytes. Blocks."""

OpenOnDisk = Callable[[CheckpointFile], ChunkSource]
"""Gives the source for a file that is whole on this host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedFile:
    """A file about to be read.

    Attributes:
        source: Gives its bytes.
        lane: Whose threads ask the source.
        together: Chunks that are read together.
        step_bytes: Bytes are ready in whole steps.
        land: Puts what arrives onto this host's disk; None = it stays in the pool only.
    """

    source: ChunkSource
    lane: Lane = Lane.DISK
    together: int = 1
    step_bytes: int = 1
    land: Land | None = None


class FarWeights(Protocol):
    """A checkpoint that comes from elsewhere; any thread."""

    def open(self, file: CheckpointFile, on_disk: OpenOnDisk, *, chunk_bytes: int) -> OpenedFile:
        """Return how a file is read now; its source must be closed.

        Args:
            file: Of the checkpoint.
            on_disk: For a file that is whole on this host by now.
            chunk_bytes: Of a pool chunk.
        """

    def locate(self, file: CheckpointFile) -> Path:
        """Return where a file lies on this host's disk now: `file.path` may be where it lay on its way."""

    def disk_bytes(self) -> int:
        """Return the bytes of weights that this host's disk has."""

    @property
    def whole(self) -> bool:
        """Whether all of it is on this host's disk."""
