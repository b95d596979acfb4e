"""Claims about folders that exist whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from stoker.checkpoint.staging import StagedFolder, check_destination, refusals_named, remove_leftovers
from stoker.errors import AlreadyExists, DiskFull, InvalidRequest


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_a_published_folder_is_at_its_destination_and_stays(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "dst") as staged:
        (staged.path / "a").write_text("1")
        staged.publish(replace=False)

    assert names(tmp_path) == {"dst"}
    assert (tmp_path / "dst" / "a").read_text() == "1"


def test_an_unpublished_folder_vanishes(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "dst") as staged:
        (staged.path / "a").write_text("1")

    assert names(tmp_path) == set()


def test_what_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "dst") as staged:
        (tmp_path / "dst").mkdir()
        (tmp_path / "dst" / "other").write_text("2")
        with pytest.raises(AlreadyExists):
            staged.publish(replace=False)

    assert names(tmp_path) == {"dst"}
    assert names(tmp_path / "dst") == {"other"}


def test_a_replaced_folder_comes_back_when_the_new_one_cannot_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "old").write_text("1")

    def broken() -> None:
        raise OSError(errno.EIO, "broken")

    with StagedFolder(tmp_path / "dst") as staged:
        monkeypatch.setattr(staged, "_appear", broken)
        with pytest.raises(OSError, match="broken"):
            staged.publish(replace=True)

    assert names(tmp_path) == {"dst"}
    assert names(tmp_path / "dst") == {"old"}


def test_leftovers_of_the_dead_go_and_those_of_others_stay(tmp_path: Path) -> None:
    for name in ("dst.partial-1", "other.partial-1", "dst2"):
        (tmp_path / name).mkdir()

    remove_leftovers(tmp_path / "dst")

    assert names(tmp_path) == {"other.partial-1", "dst2"}


def test_the_work_of_the_living_stays(tmp_path: Path) -> None:
    with StagedFolder(tmp_path / "dst") as staged:
        with pytest.raises(AlreadyExists, match="Another conversion"):
            remove_leftovers(tmp_path / "dst")

        assert staged.path.exists()


def test_without_locks_folders_are_published_and_nothing_is_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems lock no folders: then nobody can tell the dead from the living."""

    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.EBADF, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "dst.partial-1").mkdir()

    remove_leftovers(tmp_path / "dst")
    with StagedFolder(tmp_path / "dst") as staged:
        staged.publish(replace=False)

    assert names(tmp_path) == {"dst", "dst.partial-1"}


@pytest.mark.parametrize("name", ["", "a.partial-1"])
def test_a_name_that_reads_as_a_leftover_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_destination(Path(name))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EFBIG, DiskFull),
        (errno.EROFS, InvalidRequest),
        (errno.EACCES, InvalidRequest),
        (errno.EIO, OSError),
    ],
)
def test_the_systems_refusals_become_errors_that_say_what_to_do(
    number: int, expected: type[Exception]
) -> None:
    with pytest.raises(expected), refusals_named(Path("dst"), need_bytes=7):
        raise OSError(number, os.strerror(number))
