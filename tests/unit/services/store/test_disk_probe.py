"""What a probe of the disk reads, and when it lets go: on a fake file, and on small real ones."""

from __future__ import annotations

import threading

from services.store.catalog import read_entry
from services.store.disk_probe import LEAST_BYTES, READ_BYTES, DiskProbe, Sweep, file_to_probe, telling
from services.store.reading.pace import Pace
from stoker.checkpoint.reading import DISK, PAGE_CACHE, ReadPart
from tests.unit.services.store.checkpoints import write_checkpoint
from tests.unit.services.store.test_loads import store

SIZE = 3 * READ_BYTES + 100


class FakeFile:
    """Every read takes a second of its clock."""

    name = "fake"

    def __init__(self, stop: threading.Event | None = None, *, stops_in_read: int = -1) -> None:
        self.seconds = 0.0
        self.reads: list[tuple[int, int]] = []
        self._stop = stop
        self._stops_in_read = stops_in_read

    def read(self, chunk: memoryview, *, offset: int, length: int) -> list[ReadPart]:
        """See `ChunkSource`."""
        began, self.seconds = self.seconds, self.seconds + 1.0
        if self._stop is not None and len(self.reads) == self._stops_in_read:
            self._stop.set()
        self.reads.append((offset, length))
        assert len(chunk) >= length
        return [ReadPart(tier=DISK, byte_count=length, began_seconds=began, ended_seconds=self.seconds)]

    def close(self) -> None:
        """Nothing is open."""


def swept(file: FakeFile, *, until_seconds: float = 100.0, stop: threading.Event | None = None):
    sweep = Sweep(
        source=file,
        offsets=iter(range(0, SIZE, READ_BYTES)),
        size_bytes=SIZE,
        until_seconds=until_seconds,
        stop=stop or threading.Event(),
        hold=list,
    )
    return sweep.run(lambda: file.seconds)


def part(ended: float, *, count: int, tier: str = DISK) -> ReadPart:
    return ReadPart(tier=tier, byte_count=count, began_seconds=ended - 1, ended_seconds=ended)


def test_a_pass_reads_a_file_to_its_end_and_no_further():
    file = FakeFile()

    assert sum(each.byte_count for each in swept(file)) == SIZE
    assert file.reads[-1] == (3 * READ_BYTES, 100)


def test_no_read_begins_when_the_time_is_over():
    file = FakeFile()

    assert len(swept(file, until_seconds=1.5)) == 2
    assert len(file.reads) == 2


def test_a_thread_that_gets_its_turn_late_still_reads_once():
    assert len(swept(FakeFile(), until_seconds=-1.0)) == 1


def test_a_read_that_ran_beside_a_load_counts_for_nothing():
    stop = threading.Event()
    file = FakeFile(stop, stops_in_read=1)

    assert len(swept(file, stop=stop)) == 1
    assert len(file.reads) == 2


def test_a_tier_that_gave_little_tells_no_rate():
    parts = [part(3, count=LEAST_BYTES), part(2, count=LEAST_BYTES - 1, tier=PAGE_CACHE)]

    assert telling(parts) == parts[:1]


def test_a_small_checkpoint_is_not_worth_a_probe(tmp_path):
    small = read_entry(write_checkpoint(tmp_path / "a", size=1000))
    large = read_entry(write_checkpoint(tmp_path / "b", size=LEAST_BYTES))

    assert file_to_probe(small) is None
    assert file_to_probe(large) == large.index.files[0]


async def probed(made, entry, *, byte_count: int = 2 * READ_BYTES) -> DiskProbe:
    """Consider a checkpoint, and wait until the probe has ended, if there is one."""
    probe = DiskProbe(made.loads, Pace({}), byte_count=byte_count, threads=2)
    probe.consider(entry)
    if probe.running is not None:
        await probe.running
    return probe


async def test_a_probe_seeds_the_rates_of_the_tiers_and_takes_nothing_of_the_pool(tmp_path):
    async with store() as made:
        entry = read_entry(write_checkpoint(tmp_path / "a", size=LEAST_BYTES))
        with made.loads.changes.watched() as changed:
            await probed(made, entry)

        assert made.loads.transfers.rates.tiers()  # which of them, the file system of the test decides
        assert changed.is_set()
        assert made.loads.chunks.free_count == made.loads.chunks.total
        assert made.loads.residents() == []


async def test_nothing_is_probed_where_it_is_switched_off(tmp_path):
    async with store() as made:
        entry = read_entry(write_checkpoint(tmp_path / "a", size=LEAST_BYTES))
        probe = await probed(made, entry, byte_count=0)

        assert probe.running is None


async def test_a_load_under_way_or_a_known_rate_leaves_nothing_to_probe(tmp_path):
    large = read_entry(write_checkpoint(tmp_path / "a", size=LEAST_BYTES))
    small = write_checkpoint(tmp_path / "b", size=1000)
    async with store() as made:
        loading = made.loads.lease(await made.catalog.open(str(small)), urgency=0)
        assert (await probed(made, large)).running is None

        await loading.done
        made.loads.learn([part(1, count=LEAST_BYTES)])
        assert (await probed(made, large)).running is None


async def test_a_probe_that_began_gives_way_to_a_load_and_is_not_tried_again(tmp_path):
    large = read_entry(write_checkpoint(tmp_path / "a", size=LEAST_BYTES))
    small = write_checkpoint(tmp_path / "b", size=1000)
    async with store() as made:
        entry = await made.catalog.open(str(small))
        probe = DiskProbe(made.loads, Pace({}), byte_count=READ_BYTES, threads=1)
        probe.consider(large)
        first = probe.running
        made.loads.lease(entry, urgency=0)
        await first
        await made.loads.residents()[0].done
        probe.consider(large)

        assert probe.running is first
        await probe.close()
