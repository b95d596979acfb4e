"""Brings checkpoints into the pool, once each, and drops them when room is needed.

Theory of operation: everything here runs on the event loop and nothing waits. A request joins the resident
that is there or on its way (single flight per uri and revision), or makes one. `Placing` says whether it
gets chunks now, after some were given back, or never. Reader threads fill chunks; each comes back as a call
on the loop that moves the ready counter, wakes who watches and, at the end, settles the load. A load belongs
to the cluster: it goes on when who asked has left, unless a demand needs its room.

Chunks go back only when no read may write to them any more (`reads_left == 0`) and no lease maps them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from services.store.catalog import CatalogEntry
from services.store.changes import Changes
from services.store.pool.arena import Arena
from services.store.pool.chunk_pool import ChunkPool
from services.store.pool.counters import ReadyCounters
from services.store.pool.placing import Placing
from services.store.pool.resident import Phase, Resident
from services.store.pool.residents import Residents
from services.store.pool.window import Window, window_of
from services.store.reading.bandwidth import moved_by_tier, span_seconds
from services.store.reading.disk_sources import DiskSources
from services.store.reading.lanes import Lane
from services.store.reading.pace import Pace
from services.store.reading.read_plan import chunks_needed, lay_out_and_plan
from services.store.reading.read_queue import ChunkRead, Urgency
from services.store.reading.transfers import Transfers
from services.store.records import record_dropped, record_failed, record_loaded, record_rates, show_pool
from services.store.sharing import Sharing
from stoker.checkpoint.reading import ReadPart
from stoker.clock import Clock
from stoker.errors import CapacityError, InUse, PeerError, StokerError

_READER_GRACE_SECONDS = 2.0
_STOPPING = "the checkpoint store is being stopped"


class Loads:
    """The residents of the pool; used from the event loop only."""

    def __init__(  # noqa: PLR0913 - the parts it joins
        self,
        arena: Arena,
        counters: ReadyCounters,
        *,
        sources: DiskSources,
        threads: Mapping[Lane, int],
        clock: Clock,
        sharing: Sharing | None = None,
        pace: Pace | None = None,
    ) -> None:
        """Start the reader threads; call inside the running loop. `sharing` gives chunks to other stores."""
        self.arena = arena
        self.chunks = ChunkPool(arena.chunk_count)
        self.counters = counters
        self._sources = sources
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._sharing = sharing
        self.transfers = Transfers(
            threads,
            counters,
            arrived=self._arrived,
            failed=self._fail,
            ended=self._transfer_ended,
            pace=pace or Pace({}),
        )
        self._residents = Residents(clock)
        self._placing = Placing(
            self._residents,
            self.chunks,
            chunk_bytes=arena.chunk_bytes,
            rates=self.transfers.rates,
            clock=clock,
            start=self._start,
            fail=self._fail,
            drop=self._drop,
        )
        self.changes = Changes()
        self._closed = False
        show_pool(
            free_bytes=self.free_bytes,
            leased_bytes=self.leased_bytes,
            cached_bytes=lambda: max(0, arena.total_bytes - self.free_bytes() - self.leased_bytes()),
            leases=lambda: sum(each.leases for each in self._residents.everyone()),
        )

    # --- asking for checkpoints ---

    def lease(self, entry: CatalogEntry, urgency: Urgency, *, window: bool = False) -> Resident:
        """Return the checkpoint with one lease more; it may still be on its way. Pair with `end_lease`.

        Args:
            entry: The checkpoint.
            urgency: Of its load.
            window: Its bytes are used in their order, as they come; where it is larger than the pool it may
                come through a window, and who leases one joins it (`Window.join`) at once and says what it
                has `consumed`.

        Raises:
            DoesNotFit: It is larger than the pool.
            CapacityError: What holds the pool cannot be dropped now.
        """
        too_large = chunks_needed(entry, self.arena.chunk_bytes) > self.chunks.total
        ring = window_of(entry, self.chunks.total, self.arena.chunk_bytes) if window and too_large else None
        if ring is None:
            resident = self._resident(entry, urgency, used_in_order=window)
        else:
            resident = self._windowed(entry, urgency, ring)
        resident.leases += 1
        self.changes.tell()
        return resident

    def consumed(self, resident: Resident, reader: int, *, file: int, upto_bytes: int) -> None:
        """Note how far a window's reader is, and read on.

        Raises:
            PeerError: It cannot be that far.
        """
        if resident.window is not None:
            ready_bytes = [each.ready_bytes for each in resident.files]
            resident.window.consumed(reader, file=file, upto_bytes=upto_bytes, ready_bytes=ready_bytes)
            self.transfers.go_on(resident)

    def end_lease(self, resident: Resident, reader: int | None = None) -> None:
        """Take a lease back; `reader` is its number in a window, which goes with the last one."""
        resident.leases -= 1
        if resident.window is not None and reader is not None:
            resident.window.leave(reader)
            if not resident.leases and resident.phase is not Phase.GONE:
                self._leave(resident, InUse(f"nobody reads {resident.entry.uri} any more"))
            elif resident.phase is Phase.LOADING:
                self.transfers.go_on(resident)
        self._settle_if_gone(resident)
        self._placing.go_on()
        self.changes.tell()

    async def load(self, entry: CatalogEntry, urgency: Urgency, *, free_room_only: bool = False) -> Resident:
        """Return the checkpoint when all of it is in the pool. Cancelling the wait does not end the load.

        With `free_room_only` nothing is dropped for it: it is refused instead.

        Raises:
            StokerError: As `lease`; LoadFailed when it could not be read; CapacityError when a prefetch had
                to give way.
        """
        resident = self._resident(entry, urgency, free_room_only=free_room_only)
        demanded = int(urgency is Urgency.DEMAND)
        resident.demand_waiters += demanded
        try:
            await asyncio.shield(resident.done)
        finally:
            resident.demand_waiters -= demanded
        return resident

    def pin(self, entry: CatalogEntry) -> None:
        """Keep a checkpoint in the pool, and bring it there.

        Raises:
            StokerError: As `lease`; nothing is pinned then.
        """
        self._resident(entry, Urgency.PREFETCH)
        self._residents.pinned.add(entry.uri)
        self.changes.tell()

    def unpin(self, uri: str) -> None:
        """Let a checkpoint go when room is needed."""
        self._residents.pinned.discard(uri)
        self.changes.tell()

    def is_pinned(self, uri: str) -> bool:
        """Tell whether a checkpoint is pinned."""
        return uri in self._residents.pinned

    def evict(self, uri: str) -> int:
        """Drop what the pool holds of a checkpoint; returns the bytes that become free.

        Raises:
            InUse: A lease, a pin or a waiting call holds it.
        """
        found = self._residents.of_uri(uri)
        held = next(filter(self._residents.is_held, found), None)
        if held is not None:
            why = "it is pinned; unpin it" if self.is_pinned(uri) else f"{held.leases} workers have it mapped"
            raise InUse(f"{uri} stays in the pool: {why}")
        freed = sum(resident.chunk_count for resident in found) * self.arena.chunk_bytes
        for resident in found:
            self._drop(resident, "asked", InUse(f"{uri} was evicted while it was loading"))
        self._placing.go_on()
        return freed

    # --- looking on ---

    def residents(self) -> list[Resident]:
        """Return what is in the pool or on its way, without what is gone."""
        return self._residents.in_sight()

    def window_leases(self, identity: tuple[str, str]) -> int:
        """Return how many readers the windows on a checkpoint have."""
        windows = (each for each in self._residents.everyone() if each.window is not None)
        return sum(each.leases for each in windows if each.entry.identity == identity)

    def loading(self) -> bool:
        """Tell whether any load is under way, or what it brought still on its way to the disk."""
        return any(
            resident.phase in {Phase.WAITING, Phase.LOADING} or resident.landings_left
            for resident in self._residents.everyone()
        )

    def free_bytes(self) -> int:
        """Return the bytes that are nobody's; any thread."""
        return self.chunks.free_count * self.arena.chunk_bytes

    def leased_bytes(self) -> int:
        """Return the bytes that cannot be dropped now; any thread."""
        return self._residents.held_chunks() * self.arena.chunk_bytes

    async def close(self) -> None:
        """Fail what is under way, refuse what is asked from now on, and end the reader threads."""
        self._closed = True
        for resident in self._residents.everyone():
            if resident.phase in {Phase.WAITING, Phase.LOADING}:
                self._drop(resident, "stopping", PeerError(_STOPPING, retry_after_seconds=1.0))
        await self.transfers.close(grace_seconds=_READER_GRACE_SECONDS)
        self._sources.close()

    def learn(self, parts: Sequence[ReadPart]) -> None:
        """Seed the rates of tiers with reads that were made to measure them, and tell."""
        self.transfers.rates.add(parts)
        self.transfers.rates.flush()
        record_rates(self.transfers.rates.all())
        self.changes.tell()

    # --- one resident's way ---

    def _resident(
        self,
        entry: CatalogEntry,
        urgency: Urgency,
        *,
        free_room_only: bool = False,
        used_in_order: bool = False,
    ) -> Resident:
        self._refuse_when_closed()
        resident = self._residents.find(entry.identity)
        if resident is None:
            self._supersede(entry)
            need_chunks = chunks_needed(entry, self.arena.chunk_bytes)
            resident = self._residents.add(entry, need_chunks=need_chunks, urgency=urgency)
            resident.free_room_only = free_room_only
            resident.used_in_order = used_in_order  # before its reads are planned
            self._placing.newcomer(resident)
        elif urgency < resident.urgency:
            resident.urgency = urgency
            self.transfers.hurry(resident)
        if used_in_order and not resident.used_in_order and resident.phase is not Phase.READY:
            resident.used_in_order = True
            self.transfers.shorten(resident, chunk_bytes=self.arena.chunk_bytes)
        resident.free_room_only &= free_room_only
        resident.uses = resident.uses.used(self._clock.now_seconds())
        resident.last_used_unix_seconds = self._clock.unix_seconds()
        return resident

    def _windowed(self, entry: CatalogEntry, urgency: Urgency, window: Window) -> Resident:
        self._refuse_when_closed()
        resident = self._residents.window_to_join(entry.identity)
        if resident is None:
            self._supersede(entry)
            resident = self._residents.add(entry, need_chunks=window.chunks, urgency=urgency, window=window)
            self._placing.newcomer(resident)
        return resident

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise PeerError(_STOPPING, retry_after_seconds=1.0)

    def _supersede(self, entry: CatalogEntry) -> None:
        """Nobody can ask for other revisions of the uri any more: let those go that nobody holds."""
        for other in self._residents.of_uri(entry.uri):
            other.superseded = True
            if not self._residents.is_held(other):
                self._drop(other, "superseded", InUse(f"{entry.uri} was changed while it was loading"))

    def _start(self, resident: Resident) -> None:
        try:
            slots = self.counters.take(len(resident.entry.index.files))
        except CapacityError as error:
            self._fail(resident, error)
            return
        reads = lay_out_and_plan(
            resident,
            chunks=self.chunks.take(resident.need_chunks),
            slots=slots,
            arena=self.arena,
            sources=self._sources,
            disk=self.transfers.disk(),
        )
        resident.phase = Phase.LOADING
        resident.mapped.set_result(None)
        self.transfers.begin(resident, reads)
        self.changes.tell()
        if not reads:
            self._complete(resident)

    def _arrived(self, resident: Resident, read: ChunkRead) -> None:
        if self._sharing is not None and resident.window is None:
            self._sharing.arrived(resident, read)

    def _transfer_ended(self, resident: Resident) -> None:
        if resident.phase is Phase.LOADING and resident.window is not None:
            self.transfers.go_on(resident)
        if resident.phase is Phase.LOADING and resident.reads_left == 0 and resident.all_given_out:
            self._complete(resident)
        if resident.phase is Phase.GONE:
            self._settle_if_gone(resident)
            self._placing.go_on()
        elif resident.entry.far is not None:
            self.changes.tell()  # the disk has more of it

    def _complete(self, resident: Resident) -> None:
        self._close_sources(resident)
        self.transfers.rates.flush()
        resident.phase = Phase.READY
        resident.moved = moved_by_tier(resident.parts)
        resident.seconds = self._clock.now_seconds() - resident.began_seconds
        read_seconds = span_seconds(resident.parts)
        resident.parts = []
        resident.done.set_result(None)
        resident.changes.tell()
        self._loop.call_soon(self._record_loaded, resident, read_seconds)  # who waits is told first
        self.changes.tell()

    def _record_loaded(self, resident: Resident, read_seconds: float) -> None:
        record_loaded(resident, read_seconds=read_seconds)
        record_rates(self.transfers.rates.all())

    # --- and its end ---

    def _drop(self, resident: Resident, reason: str, error: StokerError) -> None:
        """Let a resident go; `error` is for those who wait for it, if it is still on its way."""
        pool_bytes = resident.chunk_count * self.arena.chunk_bytes
        record_dropped(resident, reason=reason, pool_bytes=pool_bytes)
        self._leave(resident, error)

    def _fail(self, resident: Resident, error: StokerError) -> None:
        if resident.phase is Phase.GONE:
            return
        record_failed(resident, error, seconds=self._clock.now_seconds() - resident.began_seconds)
        self._leave(resident, error)

    def _leave(self, resident: Resident, error: StokerError) -> None:
        """Take a resident out of sight; its chunks follow when nothing touches them."""
        resident.phase = Phase.GONE
        resident.error = error
        if resident.window is not None:
            resident.window.drop()
        self._residents.hide(resident)
        self.transfers.abandon(resident)
        for future in (resident.mapped, resident.done):
            if not future.done():
                future.set_exception(error)
        resident.changes.tell()
        self._settle_if_gone(resident)
        self.changes.tell()

    def _settle_if_gone(self, resident: Resident) -> None:
        """Give back what a resident took, if it is gone and nobody reads or writes it."""
        busy = resident.reads_left or resident.landings_left or resident.leases
        if resident.phase is not Phase.GONE or busy or resident not in self._residents:
            return
        if self._sharing is not None and not self._sharing.withdrawn(resident, lambda: self._sent(resident)):
            return
        self._residents.settle(resident)
        self.transfers.forget(resident)
        self._close_sources(resident)
        self.chunks.give_back(resident.chunk_numbers)
        self.counters.give_back(tuple(file.slot for file in resident.files))

    def _sent(self, resident: Resident) -> None:
        """Go on when the last chunk of a resident that is gone has been sent to a peer."""
        self._settle_if_gone(resident)
        self._placing.go_on()
        self.changes.tell()

    def _close_sources(self, resident: Resident) -> None:
        for file in resident.files:
            if file.source is not None:
                file.source.close()
                file.source = None
