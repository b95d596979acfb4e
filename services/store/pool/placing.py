"""Gives loads their room in the pool: now, once some was given back, or never. For the event loop only."""

from __future__ import annotations

from collections.abc import Callable

from services.store.origins.source import REMOTE
from services.store.pool.admission import Admitted, Refused, Waits, admit
from services.store.pool.chunk_pool import ChunkPool
from services.store.pool.occupancy import ASSUMED_BYTES_PER_SECOND, pool_as_seen
from services.store.pool.resident import Phase, Resident
from services.store.pool.residents import Residents
from services.store.reading.bandwidth import RunningRates
from stoker.checkpoint.reading import DISK
from stoker.clock import Clock
from stoker.errors import CapacityError, StokerError


class Placing:
    """Carries out what admission decides.

    Args:
        residents: Who has room, and the line of those who wait for some.
        chunks: The room.
        chunk_bytes: Of one.
        rates: How fast tiers are.
        clock: Monotonic.
        start: Begins a load whose chunks are free.
        fail: Ends one that gets none, with its reason.
        drop: Lets one go that has to make room: why in a word, and what those are told who wait for it.
    """

    def __init__(  # noqa: PLR0913 - the parts it joins
        self,
        residents: Residents,
        chunks: ChunkPool,
        *,
        chunk_bytes: int,
        rates: RunningRates,
        clock: Clock,
        start: Callable[[Resident], None],
        fail: Callable[[Resident, StokerError], None],
        drop: Callable[[Resident, str, StokerError], None],
    ) -> None:
        self._residents = residents
        self._chunks = chunks
        self._chunk_bytes = chunk_bytes
        self._rates = rates
        self._clock = clock
        self._start = start
        self._fail = fail
        self._drop = drop

    def newcomer(self, resident: Resident) -> None:
        """Place a newcomer, unless it would overtake somebody.

        Raises:
            StokerError: Why it gets no room.
        """
        waits = self._residents.someone_waits(resident.urgency)
        if waits and resident.need_chunks <= self._chunks.total:
            self._residents.queue(resident)
        else:
            self._place(resident)
        if resident.error is not None:
            raise resident.error

    def go_on(self) -> None:
        """Place those that wait, in order, until one has to wait on."""
        while (first := self._residents.next_in_line()) is not None:
            self._place(first)
            if first.phase is Phase.WAITING:
                return

    def _place(self, resident: Resident) -> None:
        """Start a load, or let it wait for chunks, or fail it."""
        pool = pool_as_seen(
            self._residents.everyone(),
            asking=resident,
            free_chunks=self._chunks.free_count,
            total_chunks=self._chunks.total,
            chunk_bytes=self._chunk_bytes,
            pinned=self._residents.pinned,
            bytes_per_second=self._bytes_per_second,
        )
        decision = admit(
            pool,
            uri=resident.entry.uri,
            need_chunks=resident.need_chunks,
            now_seconds=self._clock.now_seconds(),
        )
        match decision:
            case Refused(error=error):
                self._fail(resident, error)
            case Waits():
                self._residents.queue(resident)
            case Admitted(evict=victims):
                for key in victims:
                    gives_way = CapacityError("the prefetch gave way to a request", retry_after_seconds=1.0)
                    self._drop(self._residents[key], "room", gives_way)
                if resident.need_chunks <= self._chunks.free_count:
                    self._start(resident)
                else:
                    self._residents.queue(resident)

    def _bytes_per_second(self, resident: Resident) -> float:
        """Return how fast a resident would come back."""
        far = resident.entry.far
        tier = DISK if far is None or far.whole else REMOTE
        return self._rates.bytes_per_second(tier) or ASSUMED_BYTES_PER_SECOND
