"""A checkpoint under way on a real disk that fails at every write."""

from __future__ import annotations

import errno
import os

import pytest

from services.store.chain import NotHere
from services.store.disk_cache.partial import PartialCheckpoint
from services.store.disk_cache.record import OriginRecord
from services.store.origins.origin import RemoteFile

CONTENT = os.urandom(300)
NAME = "model.safetensors"
RECORD = OriginRecord(
    uri="s3://b/m",
    revision="r",
    files={NAME: RemoteFile(name=NAME, size_bytes=len(CONTENT), version="v")},
)


def take_up(folder, completed=lambda: None) -> PartialCheckpoint:
    return PartialCheckpoint(
        folder, RECORD, weights=[NAME], whole_folder=folder.parent / "whole", completed=completed
    )


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "partial"
    made.mkdir()
    with (made / NAME).open("wb") as file:
        file.truncate(len(CONTENT))
    return made


def land(partial: PartialCheckpoint, begin: int, end: int) -> None:
    partial.land(NAME, [memoryview(bytearray(CONTENT[begin:end]))], begin, end - begin)


def test_what_landed_is_read_and_the_rest_is_not_here(folder):
    partial = take_up(folder)
    land(partial, 100, 200)
    chunk = memoryview(bytearray(100))

    assert partial.source(NAME).read(chunk, offset=100, length=100)[0].byte_count == 100
    assert bytes(chunk) == CONTENT[100:200]
    with pytest.raises(NotHere):
        partial.source(NAME).read(chunk, offset=150, length=100)
    partial.close()


def test_what_landed_is_there_after_a_restart(folder):
    partial = take_up(folder)
    land(partial, 0, 100)
    land(partial, 200, 300)
    partial.forget(NAME, 250, 260)
    partial.close()
    again = take_up(folder)

    assert again.bytes_there() == 190
    assert again.has(NAME, 0, 100)
    assert not again.has(NAME, 200, 300)
    again.close()


def test_the_last_byte_makes_it_whole_and_reads_go_on(folder):
    ended = []
    partial = take_up(folder, lambda: ended.append(True))
    source = partial.source(NAME)
    for begin in (0, 200, 100):
        land(partial, begin, begin + 100)

    assert partial.whole
    assert ended == [True]
    assert (folder.parent / "whole" / NAME).read_bytes() == CONTENT
    assert [path.name for path in (folder.parent / "whole").iterdir()] == [NAME]
    chunk = memoryview(bytearray(300))
    source.read(chunk, offset=0, length=300)
    assert bytes(chunk) == CONTENT
    partial.close()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "open"])
def test_a_disk_that_fails_costs_the_copy_and_nothing_is_believed(folder, monkeypatch, call):
    partial = take_up(folder)

    def fail(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    land(partial, 0, 100)
    monkeypatch.undo()

    assert partial.stopped_because == "No space left on device"
    assert partial.bytes_there() == 0
    land(partial, 0, 100)
    assert partial.bytes_there() == 0  # not before it is told to try again
    partial.resume()
    land(partial, 0, 100)
    assert partial.bytes_there() == 100
    partial.close()
