"""A checkpoint in the pool, or on its way into it: what it takes, how far it is, who holds it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum

from services.store.catalog import CatalogEntry
from services.store.changes import Changes
from services.store.far_weights import Land
from services.store.pool.eviction import Uses
from services.store.pool.window import Window
from services.store.reading.bandwidth import Moved
from services.store.reading.chunk_source import ChunkSource
from services.store.reading.lanes import Lane
from services.store.reading.read_queue import Urgency
from stoker.checkpoint.reading import ReadPart
from stoker.errors import StokerError


class Phase(Enum):
    """Where a checkpoint is on its way."""

    WAITING = "waiting"
    """For chunks that are being given back."""

    LOADING = "loading"
    READY = "ready"
    GONE = "gone"
    """Failed or dropped: nobody new gets it; its chunks follow when nothing touches them any more."""


@dataclass(slots=True, kw_only=True)
class ResidentFile:
    """A file's chunks and how many of them have arrived.

    Attributes:
        size_bytes: Of the file.
        chunk_bytes: Of a chunk.
        chunks: Numbers of its chunks in the arena, in the order of the file.
        slot: Of its ready counter.
        source: Where it is read from; None once it is all there.
        lane: Whose threads read it.
        together: Chunks that are read together.
        land: Puts what arrives from afar onto this host's disk.
        step_bytes: Bytes are ready in whole steps: what one digest covers, where digests are checked.
        arrived: A flag per chunk.
        prefix: Chunks that have arrived, counted from the start without a gap.
    """

    size_bytes: int
    chunk_bytes: int
    chunks: tuple[int, ...]
    slot: int
    source: ChunkSource | None
    lane: Lane = Lane.DISK
    together: int = 1
    land: Land | None = None
    step_bytes: int = 1
    arrived: bytearray = field(init=False)
    prefix: int = 0

    def __post_init__(self) -> None:
        self.arrived = bytearray(len(self.chunks))

    @property
    def ready_bytes(self) -> int:
        """Bytes there and checked, counted from the start.

        A digest over several chunks is checked when the last of them arrives, so bytes behind the last whole
        step may be unchecked.
        """
        there = min(self.prefix * self.chunk_bytes, self.size_bytes)
        return there if there == self.size_bytes else there - there % self.step_bytes

    def arrive(self, index: int) -> bool:
        """Note that a chunk is there; True when the contiguous part grew."""
        self.arrived[index] = 1
        before = self.prefix
        while self.prefix < len(self.arrived) and self.arrived[self.prefix]:
            self.prefix += 1
        return self.prefix > before

    def length(self, index: int) -> int:
        """Return how many bytes of the file a chunk holds."""
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)


@dataclass(slots=True, kw_only=True, eq=False)
class Resident:
    """One revision of a checkpoint; changed by the event loop only.

    Attributes:
        key: A number of its own, also of its load.
        entry: The checkpoint.
        need_chunks: What it takes.
        urgency: Of its load.
        began_seconds: When it was asked for, monotonic.
        uses: How it has been used.
        last_used_unix_seconds: For people.
        phase: Where it is.
        files: Empty while it waits.
        reads_left: Reads queued or running: while there are any, its chunks may be written to.
        landings_left: Writes to this host's disk queued or running: they read its chunks.
        leases: Attach connections.
        demand_waiters: Calls that wait for it on someone's behalf.
        superseded: Its files have changed since.
        free_room_only: Nothing is dropped for it while it waits for chunks.
        used_in_order: Somebody who asked for it before it was loaded uses its bytes as they come.
        parts: What its load has moved so far.
        moved: The same by tier, once loaded.
        seconds: What the load took, once loaded.
        error: Why it is gone, if it failed.
        window: What of it is there at a time, where it is larger than the pool: its readers' alone.
        mapped: Done when it has its chunks; fails when it gets none.
        done: Done when it is loaded; fails when it isn't.
    """

    key: int
    entry: CatalogEntry
    need_chunks: int
    urgency: Urgency
    began_seconds: float
    uses: Uses
    last_used_unix_seconds: float
    mapped: asyncio.Future[None]
    done: asyncio.Future[None]
    phase: Phase = Phase.WAITING
    files: tuple[ResidentFile, ...] = ()
    reads_left: int = 0
    landings_left: int = 0
    leases: int = 0
    demand_waiters: int = 0
    superseded: bool = False
    free_room_only: bool = False
    used_in_order: bool = False
    parts: list[ReadPart] = field(default_factory=list)
    moved: tuple[Moved, ...] = ()
    seconds: float = 0.0
    error: StokerError | None = None
    window: Window | None = None
    changes: Changes = field(default_factory=Changes)
    """Told whenever it gets further, is done, or fails."""

    @property
    def ready_bytes(self) -> int:
        """Bytes of all files that are there."""
        return sum(file.ready_bytes for file in self.files)

    @property
    def all_given_out(self) -> bool:
        """Tell whether no read is held back until there is room in its window."""
        return self.window is None or self.window.all_given_out

    @property
    def chunk_count(self) -> int:
        """How many chunks it has; none while it waits for them."""
        return self.need_chunks if self.files else 0

    @property
    def chunk_numbers(self) -> tuple[int, ...]:
        """All its chunks, each once."""
        return tuple(dict.fromkeys(chunk for file in self.files for chunk in file.chunks))
