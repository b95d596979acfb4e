"""Checkpoints on their way into the pool and out of it: real memory, real files, no sockets."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager

import pytest
from prometheus_client import REGISTRY

from services.store.catalog import Catalog
from services.store.integrity.damaged_copies import DamagedCopies
from services.store.integrity.verified_parts import VerifiedParts
from services.store.loads import Loads
from services.store.messages import store_status
from services.store.pool.arena import open_arena
from services.store.pool.counters import ReadyCounters
from services.store.pool.resident import Phase
from services.store.reading.disk_sources import DiskSources
from services.store.reading.lanes import Lane
from services.store.reading.pace import Pace
from services.store.reading.read_queue import Urgency
from services.store.settings import StoreSettings, VerifyDisk
from stoker.checkpoint.reading import DISK, ReadPart
from stoker.clock import ManualClock
from stoker.errors import CapacityError, DoesNotFit, InUse, LoadFailed, PeerError
from stoker.units import KIB
from tests.unit.services.store.checkpoints import write_checkpoint

CHUNK = 64 * KIB


class Store:
    """A catalog and a pool of a few chunks."""

    def __init__(self, chunks: int, counters: int, policy: VerifyDisk, pace: Pace | None) -> None:
        self.catalog = Catalog(allowed_roots=())
        settings = StoreSettings(pool_bytes=chunks * CHUNK, chunk_bytes=CHUNK)
        self.arena = open_arena(settings)
        self.counters = ReadyCounters(counters)
        self.clock = ManualClock()
        self.loads = Loads(
            self.arena,
            self.counters,
            sources=DiskSources(
                policy, VerifiedParts(None), DamagedCopies(None, lambda _path, _damages: None)
            ),
            threads=dict.fromkeys(Lane, 2),
            clock=self.clock,
            pace=pace,
        )

    async def load(self, folder, urgency=Urgency.DEMAND):
        """Open the folder and load it."""
        return await self.loads.load(await self.catalog.open(str(folder)), urgency)

    def content(self, resident) -> bytes:
        """The bytes of a resident's only file, as the pool has them."""
        (file,) = resident.files
        chunks = b"".join(self.arena.chunk(chunk) for chunk in file.chunks)
        return chunks[: file.size_bytes]


class Held(Pace):
    """Lets no read end before it is closed."""

    def __init__(self) -> None:
        super().__init__({})

    def hold(self, parts):
        """Wait."""
        self._closed.wait()
        return list(parts)


@asynccontextmanager
async def store(
    chunks: int = 8, counters: int = 64, policy: VerifyDisk = VerifyDisk.FIRST, pace: Pace | None = None
):
    made = Store(chunks, counters, policy, pace)
    try:
        yield made
    finally:
        await made.loads.close()
        made.catalog.close()
        made.arena.close()
        made.counters.close()


async def test_a_loaded_checkpoint_is_the_file_byte_for_byte(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=100_003)
    async with store() as made:
        resident = await made.load(folder)

        assert made.content(resident) == (folder / "model.safetensors").read_bytes()
        assert made.counters.get(resident.files[0].slot) == resident.files[0].size_bytes
        assert sum(moved.byte_count for moved in resident.moved) == resident.files[0].size_bytes


async def test_a_load_that_a_forward_pass_follows_has_little_on_its_way_at_a_time(tmp_path):
    async with store(chunks=64) as made:
        made.loads.learn([ReadPart(tier=DISK, byte_count=2**30, began_seconds=0.0, ended_seconds=1.0)])
        reads = {}
        for followed in (True, False):
            folder = write_checkpoint(tmp_path / str(followed), size=12 * CHUNK - 500)
            entry = await made.catalog.open(str(folder))
            reads[followed] = made.loads.lease(entry, Urgency.DEMAND, window=followed).reads_left

        assert reads == {True: 24, False: 6}


async def test_a_prefetch_that_a_forward_pass_joins_has_as_little_on_its_way_as_if_it_had_begun_it(tmp_path):
    held = Held()
    async with store(chunks=64, pace=held) as made:
        made.loads.learn([ReadPart(tier=DISK, byte_count=2**30, began_seconds=0.0, ended_seconds=1.0)])
        folder = write_checkpoint(tmp_path / "a", size=12 * CHUNK - 500)
        entry = await made.catalog.open(str(folder))
        loading = made.loads.lease(entry, Urgency.PREFETCH)
        alone = loading.reads_left
        joined = made.loads.lease(entry, Urgency.DEMAND, window=True)
        reads = joined.reads_left
        held.close()
        await joined.done

        assert joined is loading
        assert alone == 6
        assert reads >= 16 + 2  # two threads may have taken a read of four chunks each
        assert made.content(joined) == (folder / "model.safetensors").read_bytes()


async def test_reads_that_one_digest_covers_are_not_cut_for_who_joins(tmp_path):
    held = Held()
    async with store(chunks=64, pace=held) as made:
        made.loads.learn([ReadPart(tier=DISK, byte_count=2**30, began_seconds=0.0, ended_seconds=1.0)])
        entry = await made.catalog.open(str(write_checkpoint(tmp_path / "a", size=12 * CHUNK - 500)))
        loading = made.loads.lease(entry, Urgency.PREFETCH)
        before = loading.reads_left
        loading.files[0].together = 4  # as of a checkpoint from elsewhere
        made.loads.lease(entry, Urgency.DEMAND, window=True)
        after = loading.reads_left
        held.close()
        await loading.done

        assert after == before == 6


async def test_many_who_ask_share_one_load(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=100_003)
    async with store() as made:
        residents = await asyncio.gather(*(made.load(folder) for _ in range(10)))

        assert len(set(map(id, residents))) == 1
        assert made.loads.chunks.free_count == 8 - residents[0].need_chunks


async def test_a_load_goes_on_when_who_asked_has_left(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=100_003)
    async with store() as made:
        resident = made.loads.lease(await made.catalog.open(str(folder)), Urgency.DEMAND)
        made.loads.end_lease(resident)
        await resident.done

        assert resident.phase is Phase.READY


async def test_room_is_made_by_the_one_that_is_used_least(tmp_path):
    a, b, c = (write_checkpoint(tmp_path / name, size=90_000) for name in "abc")
    async with store(chunks=6) as made:
        await made.load(a)
        await made.load(b)
        await made.load(a)
        await made.load(c)

        assert {each.entry.index.path for each in made.loads.residents()} == {a, c}


async def test_a_leased_checkpoint_is_neither_dropped_for_room_nor_evicted(tmp_path):
    a, b = (write_checkpoint(tmp_path / name, size=90_000) for name in "ab")
    async with store(chunks=4) as made:
        resident = made.loads.lease(await made.catalog.open(str(a)), Urgency.DEMAND)
        await resident.done

        with pytest.raises(CapacityError, match="held by running models"):
            await made.load(b)
        with pytest.raises(InUse, match="1 workers have it mapped"):
            made.loads.evict(str(a))
        made.loads.end_lease(resident)
        await made.load(b)


async def test_the_pools_gauges_say_what_is_true_when_they_are_read(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=CHUNK)
    states = ("free", "leased", "cached")

    def gauges():
        pool = [
            REGISTRY.get_sample_value("stoker_store_pool_bytes", {"state": each}) / CHUNK for each in states
        ]
        return *pool, REGISTRY.get_sample_value("stoker_store_leases")

    async with store(chunks=8) as made:
        seen = [gauges()]
        resident = made.loads.lease(await made.catalog.open(str(folder)), Urgency.DEMAND)
        await resident.done
        seen.append(gauges())
        made.loads.end_lease(resident)
        seen.append(gauges())
        taken = resident.need_chunks

        assert seen == [(8, 0, 0, 0), (8 - taken, taken, 0, 1), (8 - taken, 0, taken, 0)]


async def test_a_pinned_checkpoint_stays_until_unpinned(tmp_path):
    a, b = (write_checkpoint(tmp_path / name, size=90_000) for name in "ab")
    async with store(chunks=4) as made:
        made.loads.pin(await made.catalog.open(str(a)))
        await made.load(a)

        with pytest.raises(InUse, match="pinned"):
            made.loads.evict(str(a))
        with pytest.raises(CapacityError):
            await made.load(b)
        made.loads.unpin(str(a))
        assert made.loads.evict(str(a)) == 3 * CHUNK


async def test_a_checkpoint_larger_than_the_pool_is_refused_and_leaves_nothing(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=300_000)
    async with store(chunks=4) as made:
        with pytest.raises(DoesNotFit, match="STOKER_STORE_POOL_BYTES"):
            await made.load(folder)

        assert made.loads.chunks.free_count == 4
        assert made.loads.residents() == []


async def test_a_file_that_shrank_since_its_header_was_read_fails_and_gives_everything_back(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=100_003)
    async with store() as made:
        entry = await made.catalog.open(str(folder))
        os.truncate(folder / "model.safetensors", 70_000)

        with pytest.raises(LoadFailed, match="changed or replaced"):
            await made.loads.load(entry, Urgency.DEMAND)
        await settled(made)
        assert made.loads.chunks.free_count == 8


async def settled(made: Store) -> None:
    """Let reads that were running come back."""
    while made.loads._residents:  # noqa: ASYNC110 - turns of the loop, not time
        await asyncio.sleep(0)


async def test_a_failed_load_is_tried_afresh_by_the_next_who_asks(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=100_003)
    good = (folder / "model.safetensors").read_bytes()
    async with store() as made:
        entry = await made.catalog.open(str(folder))
        os.truncate(folder / "model.safetensors", 70_000)
        with pytest.raises(LoadFailed):
            await made.loads.load(entry, Urgency.DEMAND)
        (folder / "model.safetensors").write_bytes(good)

        assert made.content(await made.load(folder)) == good


async def test_chunks_of_a_failed_load_stay_taken_while_a_worker_maps_them(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=100_003)
    async with store() as made:
        entry = await made.catalog.open(str(folder))
        os.truncate(folder / "model.safetensors", 70_000)
        resident = made.loads.lease(entry, Urgency.DEMAND)
        with pytest.raises(LoadFailed):
            await resident.done
        while resident.reads_left:  # noqa: ASYNC110 - turns of the loop, not time
            await asyncio.sleep(0)

        assert made.loads.chunks.free_count == 8 - resident.need_chunks
        made.loads.end_lease(resident)
        assert made.loads.chunks.free_count == 8


async def test_a_new_revision_lets_the_old_one_go(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=90_000)
    async with store() as made:
        await made.load(folder)
        write_checkpoint(folder, size=90_001)
        await made.load(folder)

        assert len(made.loads.residents()) == 1
        assert made.loads.chunks.free_count == 5


async def test_a_superseded_revision_stays_while_a_worker_maps_it(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=90_000)
    async with store() as made:
        old = made.loads.lease(await made.catalog.open(str(folder)), Urgency.DEMAND)
        await old.done
        before = made.content(old)
        write_checkpoint(folder, size=90_001)
        await made.load(folder)

        assert made.content(old) == before
        made.loads.end_lease(old)


async def test_a_prefetch_gives_way_to_a_demand(tmp_path):
    a, b = (write_checkpoint(tmp_path / name, size=100_000) for name in "ab")
    async with store(chunks=4) as made:
        prefetched = made.loads._resident(await made.catalog.open(str(a)), Urgency.PREFETCH)
        wanted = await made.load(b)

        assert wanted.phase is Phase.READY
        assert prefetched.phase is Phase.GONE


async def test_a_prefetch_into_free_room_drops_nothing_and_is_refused_without(tmp_path):
    a, b, c = (write_checkpoint(tmp_path / name, size=100_000) for name in "abc")
    async with store(chunks=8) as made:
        kept = await made.load(a)
        fits = await made.catalog.open(str(b))
        too_many = await made.catalog.open(str(c))

        assert (await made.loads.load(fits, Urgency.PREFETCH, free_room_only=True)).phase is Phase.READY
        with pytest.raises(CapacityError):
            await made.loads.load(too_many, Urgency.PREFETCH, free_room_only=True)
        assert kept.phase is Phase.READY


async def test_a_prefetch_does_not_end_another_one(tmp_path):
    a, b = (write_checkpoint(tmp_path / name, size=100_000) for name in "ab")
    async with store(chunks=4) as made:
        opened = [await made.catalog.open(str(folder)) for folder in (a, b)]
        first = made.loads._resident(opened[0], Urgency.PREFETCH)

        with pytest.raises(CapacityError):
            made.loads._resident(opened[1], Urgency.PREFETCH)
        await first.done


async def test_a_stopped_pool_takes_no_more_requests(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=100)
    async with store() as made:
        await made.loads.close()

        with pytest.raises(PeerError, match="being stopped"):
            await made.load(folder)


async def test_stopping_fails_what_is_under_way(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=100_000)
    async with store() as made:
        resident = made.loads.lease(await made.catalog.open(str(folder)), Urgency.DEMAND)
        await made.loads.close()

        with pytest.raises(PeerError, match="being stopped"):
            await resident.done


async def test_too_many_files_for_the_counters_are_refused_and_leave_nothing(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=100)
    async with store(counters=512) as made:
        made.counters.take(512)

        with pytest.raises(CapacityError, match="ready counter"):
            await made.load(folder)
        assert made.loads.chunks.free_count == 8


async def test_the_status_says_what_a_window_takes_and_who_reads_through_one(tmp_path):
    async with store(chunks=4) as made:
        entry = await made.catalog.open(str(write_checkpoint(tmp_path / "m", size=3 * CHUNK)))
        resident = made.loads.lease(entry, Urgency.DEMAND, window=True)
        reader = resident.window.join()
        read_through = store_status(made.loads, made.catalog.entries())

        made.loads.end_lease(resident, reader)
        left = store_status(made.loads, made.catalog.entries())

        assert read_through.pool.window_bytes == read_through.pool.leased_bytes == 2 * CHUNK
        assert [(each.leases, each.dram_bytes) for each in read_through.checkpoints] == [(1, 0)]
        assert [each.leases for each in left.checkpoints] == [0]
        await settled(made)


async def test_a_pool_that_is_too_small_for_a_window_says_so():
    async with store(chunks=1) as made:
        assert store_status(made.loads, []).pool.window_bytes == 0
