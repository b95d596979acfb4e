"""A checkpoint under way on a real disk that fails at every write."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

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


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "open", "write"])
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


def test_a_note_that_the_disk_cut_off_is_not_believed_and_takes_no_other_with_it(folder, monkeypatch):
    partial = take_up(folder)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[: len(line) // 2]))
    land(partial, 0, 100)
    monkeypatch.undo()
    partial.resume()
    land(partial, 100, 200)
    partial.close()
    again = take_up(folder)

    assert (again.has(NAME, 0, 100), again.has(NAME, 100, 200)) == (False, True)
    again.close()


def test_it_is_whole_when_its_folder_is_in_place_and_not_before(folder, monkeypatch):
    partial = take_up(folder)
    rename, seen = Path.rename, []

    def watched(self: Path, target: Path) -> Path:
        seen.append(partial.whole)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    land(partial, 0, 300)

    assert (seen, partial.whole, partial.folder) == ([False], True, folder.parent / "whole")
    partial.close()


def test_a_folder_that_could_not_take_its_place_does_so_when_it_is_used_again(folder, monkeypatch):
    partial = take_up(folder)

    def fail(*_args):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", fail)
    land(partial, 0, 300)
    monkeypatch.undo()

    assert (partial.whole, partial.stopped_because) == (False, "Permission denied")
    partial.resume()
    land(partial, 0, 300)
    assert partial.whole
    partial.close()


@pytest.mark.parametrize("moment", ["before the file is opened", "before it takes its place"])
def test_what_lands_while_its_folder_is_dropped_touches_no_other_of_that_name(folder, monkeypatch, moment):
    """Another daemon's worth of bad luck: dropped, fetched anew under the same name and descriptors."""
    partial = take_up(folder)
    successors = []
    os_open, utime = os.open, os.utime

    def drop() -> None:
        monkeypatch.undo()
        partial.close()
        folder.rename(folder.parent / "trash")
        folder.mkdir()
        (folder / NAME).write_bytes(bytes(len(CONTENT)))
        successors.append(take_up(folder))

    def opened(*args, **kwargs):
        drop()
        return os_open(*args, **kwargs)

    def dated(*args, **kwargs):
        drop()
        utime(*args, **kwargs)

    if moment == "before the file is opened":
        monkeypatch.setattr(os, "open", opened)
    else:
        monkeypatch.setattr(os, "utime", dated)
    land(partial, 0, 300)

    (successor,) = successors
    assert (folder / NAME).read_bytes() == bytes(len(CONTENT))
    assert not (folder.parent / "whole").exists()
    assert (partial.whole, successor.whole, successor.bytes_there()) == (False, False, 0)
    land(successor, 0, 300)
    assert (folder.parent / "whole" / NAME).read_bytes() == CONTENT
    successor.close()


def test_bytes_found_wrong_while_it_becomes_whole_are_waited_for(folder, monkeypatch):
    partial = take_up(folder)
    utime = os.utime

    def dated(*args, **kwargs):
        monkeypatch.undo()
        partial.forget(NAME, 10, 20)
        utime(*args, **kwargs)

    monkeypatch.setattr(os, "utime", dated)
    land(partial, 0, 300)

    assert not partial.whole
    land(partial, 0, 100)
    assert partial.whole
    partial.close()


def test_descriptors_are_given_up(folder):
    before = len(list(Path("/proc/self/fd").iterdir()))
    partial = take_up(folder)
    land(partial, 0, 100)
    partial.close()
    partial.close()

    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not partial.has(NAME, 100, 200)
    with pytest.raises(NotHere):
        partial.source(NAME).read(memoryview(bytearray(100)), offset=0, length=100)


WRITES = ("open", "pwrite", "fdatasync", "write", "utime", "fsync", "unlink")


def fail_once(monkeypatch, at: int, code: int) -> list[str]:
    """Have the call of this number, of all that change the disk, fail; returns the names of those made."""
    made: list[str] = []

    def install(where: object, name: str) -> None:
        real = getattr(where, name)

        def call(*args, **kwargs):
            made.append(name)
            if len(made) - 1 == at:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        monkeypatch.setattr(where, name, call)

    for name in WRITES:
        install(os, name)
    install(Path, "rename")
    return made


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_whichever_call_the_disk_refuses_the_copy_ends_up_whole_and_right(
    tmp_path, monkeypatch, code, restart
):
    for at in itertools.count():
        folder = tmp_path / str(at) / "partial"
        folder.mkdir(parents=True)
        (folder / NAME).write_bytes(bytes(len(CONTENT)))
        partial = take_up(folder)
        with monkeypatch.context() as patched:
            made = fail_once(patched, at, code)
            for begin in (0, 100, 200):
                land(partial, begin, begin + 100)
        if restart and not partial.whole:
            partial.close()
            partial = take_up(folder)
            partial.finish_if_covered()
        partial.resume()
        for begin in (0, 100, 200):
            land(partial, begin, begin + 100)

        assert partial.whole, made[at:]
        assert (folder.parent / "whole" / NAME).read_bytes() == CONTENT
        partial.close()
        if len(made) <= at:
            break
    assert at > len(WRITES)
