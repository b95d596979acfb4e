"""Loads over a disk that errs, reads short or lies, and under a wall clock that jumps."""

from __future__ import annotations

import errno
import itertools
import os
import random

import pytest

from services.store import metrics
from services.store.settings import VerifyDisk
from stoker.checkpoint import reading
from stoker.checkpoint.convert import convert
from stoker.errors import LoadFailed
from tests.unit.services.store.checkpoints import write_checkpoint
from tests.unit.services.store.test_loads import store


@pytest.fixture
def disk(monkeypatch):
    """Put something between every read and the kernel: called with the real read and its arguments."""

    def install(fault) -> None:
        real = os.preadv
        monkeypatch.setattr(reading.os, "preadv", lambda *arguments: fault(real, *arguments))

    return install


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOMEM, errno.ESTALE, errno.EREMOTEIO])
async def test_an_io_error_fails_the_load_that_met_it_and_gives_its_room_back(tmp_path, disk, code):
    folder, other = (write_checkpoint(tmp_path / name, size=100_000) for name in "ab")
    async with store() as made:
        reads = itertools.count()

        def fault(real, *arguments):
            if next(reads) == 2:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        disk(fault)
        with pytest.raises(LoadFailed, match=f"{os.strerror(code)}; check the disk"):
            await made.load(folder)
        again = await made.load(folder)

        assert made.content(again) == (folder / "model.safetensors").read_bytes()
        assert made.content(await made.load(other)) == (other / "model.safetensors").read_bytes()


async def test_short_reads_of_any_length_lose_nothing(tmp_path, disk):
    folder = write_checkpoint(tmp_path / "a", size=100_003)
    random_ = random.Random(3)

    def short(real, descriptor, buffers, offset, *flags):
        (buffer,) = buffers
        blocks = max(1, len(buffer) // 4096)
        return real(descriptor, [buffer[: 4096 * random_.randint(1, blocks)]], offset, *flags)

    disk(short)
    async with store() as made:
        assert made.content(await made.load(folder)) == (folder / "model.safetensors").read_bytes()


class Lie:
    """Flips a bit of one byte of the file, whatever read brings it."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.lies = True

    def __call__(self, real, descriptor, buffers, offset, *flags) -> int:
        """Read, then lie."""
        count = real(descriptor, buffers, offset, *flags)
        if self.lies and offset <= self.position < offset + count:
            buffers[0][self.position - offset] ^= 1
        return count


async def test_a_disk_that_lies_is_found_out_counted_and_believed_once_it_tells_the_truth(tmp_path, disk):
    convert(write_checkpoint(tmp_path / "plain", size=50_000), tmp_path / "m")
    lie = Lie(5000)
    disk(lie)
    counted = metrics.DAMAGED_PARTS.labels(owner="user")
    before = counted._value.get()
    async with store(policy=VerifyDisk.FIRST) as made:
        with pytest.raises(LoadFailed, match="is damaged"):
            await made.load(tmp_path / "m")
        lie.lies = False
        resident = await made.load(tmp_path / "m")

        assert made.content(resident) == (tmp_path / "m" / "model.safetensors").read_bytes()
    assert counted._value.get() == before + 1


async def test_never_checks_nothing(tmp_path, disk):
    convert(write_checkpoint(tmp_path / "plain", size=50_000), tmp_path / "m")
    disk(Lie(5000))
    async with store(policy=VerifyDisk.NEVER) as made:
        resident = await made.load(tmp_path / "m")

        assert made.content(resident) != (tmp_path / "m" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("jump_seconds", [-(10.0**9), 10.0**9])
async def test_a_wall_clock_that_jumps_changes_neither_who_is_evicted_nor_what_a_load_took(
    tmp_path, monkeypatch, jump_seconds
):
    a, b, c = (write_checkpoint(tmp_path / name, size=90_000) for name in "abc")
    async with store(chunks=6) as made:
        await made.load(a)
        await made.load(b)
        monkeypatch.setattr(made.clock, "unix_seconds", lambda: made.clock.now_seconds() + jump_seconds)
        await made.load(a)
        last = await made.load(c)

        assert {each.entry.index.path for each in made.loads.residents()} == {a, c}
        assert 0.0 <= last.seconds < 1.0
