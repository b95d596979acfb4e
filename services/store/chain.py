"""Chunks of a checkpoint that is not whole on this host: from the nearest source that gives the right bytes.

Order: what the disk cache has, then peers, then the origin. A source that fails, or whose bytes are not those
that the digests promise, is passed over for this run of chunks and the next one is asked; the load fails only
when the last one did. What comes from outside the host is never returned unchecked where there are digests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from services.store.integrity.digests import ChunkDamaged, Damage, FileDigests, PartCheck, damaged
from services.store.reading.chunk_source import ChunkSource, fill_run
from stoker.checkpoint.reading import ReadPart
from stoker.errors import LoadFailed, PeerError


class Tier(IntEnum):
    """Where bytes can come from, the nearest first."""

    CACHE = 0
    PEER = 1
    ORIGIN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FarFile:
    """A weights file whose bytes are elsewhere.

    Attributes:
        uri: Of its checkpoint.
        revision: Of its checkpoint; the bytes wanted are those of this revision.
        name: In the checkpoint's folder.
        size_bytes: Whole size.
        digests: What its bytes must have; None where nobody made any.
    """

    uri: str
    revision: str
    name: str
    size_bytes: int
    digests: FileDigests | None


class OpenFile(Protocol):
    """A tier that may have a file: how it plugs into the chain."""

    def __call__(
        self, file: FarFile, origin: ChunkSource, *, chunk_bytes: int, gives_way: bool = False
    ) -> ChunkSource | None:
        """Return a source for `file`, or None when this tier can't have it; must not block.

        Args:
            file: Which.
            origin: Where this store's share of the bytes comes from; stays the caller's to close.
            chunk_bytes: Of a pool chunk.
            gives_way: Another load of the file may take it over; reads raise `GaveWay` then.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One source of a chain.

    Attributes:
        tier: What kind it is.
        source: Gives the bytes, or raises LoadFailed.
        checked: It compares digests itself, by its own policy.
    """

    tier: Tier
    source: ChunkSource
    checked: bool = False


class NotHere(LoadFailed):
    """A source doesn't have these bytes, as it may well be: the next one is asked and nobody is told."""


class GaveWay(PeerError):
    """Another load has taken over what this one was doing, or it was ended: no source is asked any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A source that did not give the right bytes.

    Attributes:
        tier: What kind it is.
        source: Its name.
        file: The file's name.
        offset: First byte wanted.
        length: Bytes wanted.
        damaged: It gave bytes, and they were wrong.
        reason: For people.
    """

    tier: Tier
    source: str
    file: str
    offset: int
    length: int
    damaged: bool
    reason: str


def order_of_sources(links: Sequence[Link]) -> tuple[Link, ...]:
    """Return the sources in the order in which they are asked: nearest first, else as given. Pure."""
    return tuple(sorted(links, key=lambda link: link.tier))


def run_chunks(file: FarFile, chunk_bytes: int) -> int:
    """Return how many pool chunks are read together so that whole digests cover them; pure.

    Args:
        file: Its digests may cover more or less than a chunk of the pool.
        chunk_bytes: Of a pool chunk.
    """
    if file.digests is None:
        return 1
    together = math.lcm(file.digests.part_bytes, chunk_bytes) // chunk_bytes
    return min(together, max(1, -(-file.size_bytes // chunk_bytes)))


class Chain:
    """A file's sources in turn; a `ChunkSource` itself. Used from reader threads."""

    def __init__(
        self,
        file: FarFile,
        links: Sequence[Link],
        refused: Callable[[Refusal], None],
        *,
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the sources.

        Args:
            file: What is read.
            links: In any order, at least one.
            refused: Told of every source passed over, from any thread.
            closed: Called once when the chain is closed.
        """
        self.file = file
        self._links = order_of_sources(links)
        self._refused = refused
        self._closed: Callable[[], None] | None = closed

    @property
    def name(self) -> str:
        """See `ChunkSource`."""
        return f"{self.file.uri}/{self.file.name}"

    def read(self, chunk: memoryview, *, offset: int, length: int) -> list[ReadPart]:
        """See `ChunkSource`; the chunk must cover whole digests (`run_chunks` is 1)."""
        return self.read_run([chunk], offset=offset, length=length)

    def read_run(self, chunks: Sequence[memoryview], *, offset: int, length: int) -> list[ReadPart]:
        """Fill a run of chunks from one source, the first that has the right bytes; blocks.

        Args:
            chunks: In order, all of one size; as many as `run_chunks` says, fewer at the end.
            offset: Of the first chunk in the file.
            length: Bytes of all of them.

        Raises:
            LoadFailed: No source has them; names every one that was asked and why it failed.
        """
        reasons = []
        for link in self._links:
            try:
                parts = fill_run(link.source, chunks, offset=offset, length=length)
                if not link.checked:
                    self._check(link.source.name, chunks, offset=offset, length=length)
            except NotHere as error:
                reasons.append(f"{link.source.name}: {error.message}")
                continue
            except LoadFailed as error:
                failure = error
            else:
                return parts
            reasons.append(f"{link.source.name}: {failure.message}")
            self._refused(
                Refusal(
                    tier=link.tier,
                    source=link.source.name,
                    file=self.file.name,
                    offset=offset,
                    length=length,
                    damaged=isinstance(failure, ChunkDamaged),
                    reason=failure.message,
                )
            )
        raise LoadFailed(
            f"{self.name}: bytes {offset:,} to {offset + length:,} cannot be had from anywhere: "
            + "; ".join(reasons)
        )

    def _check(self, name: str, chunks: Sequence[memoryview], *, offset: int, length: int) -> None:
        if self.file.digests is None:
            return
        check = PartCheck(self.file.digests)
        damages: list[Damage] = []
        for at, chunk in zip(range(0, length, len(chunks[0])), chunks, strict=True):
            count = min(len(chunk), length - at)
            damages += check.arrived(chunk, offset=offset + at, length=count)[1]
        if damages:
            raise damaged(name, damages, advice="another source is asked")

    def close(self) -> None:
        """See `ChunkSource`."""
        for link in self._links:
            link.source.close()
        closed, self._closed = self._closed, None
        if closed is not None:
            closed()
