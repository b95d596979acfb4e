"""The disk cache of small files is whole or absent, flat, and bounded."""

from __future__ import annotations

import os
from pathlib import Path

from services.gateway.small_files import write_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_written_as_one_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", {"a.json": b"1", "b.json": b"2"}, 100)

    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["a.json", "b.json"]


def test_names_that_leave_the_folder_are_not_written(tmp_path: Path) -> None:
    write_folder(tmp_path / "cache" / "model", {"../../evil": b"1", "sub/x": b"2", "ok": b"3"}, 100)

    assert names(tmp_path) == ["cache"]
    assert names(tmp_path / "cache" / "model") == ["ok"]


def test_the_least_recently_used_folders_give_way(tmp_path: Path) -> None:
    for age, name in enumerate(("old", "middle"), start=1):
        write_folder(tmp_path / name, {"f": b"x" * 40}, 100)
        os.utime(tmp_path / name, (age, age))
    write_folder(tmp_path / "new", {"f": b"x" * 40}, 100)

    assert names(tmp_path) == ["middle", "new"]


def test_a_folder_that_is_there_already_is_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", {"f": b"1"}, 100)
    write_folder(tmp_path / "model", {"f": b"2"}, 100)

    assert (tmp_path / "model" / "f").read_bytes() == b"1"
    assert names(tmp_path) == ["model"]


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    write_folder(blocked / "model", {"f": b"1"}, 100)

    assert blocked.is_file()
