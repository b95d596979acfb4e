"""A worker's output: lines, tail, followers, bounds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.node_agent.workers import worker_log
from services.node_agent.workers.log_folder import KEPT_LOGS, LogFolder
from services.node_agent.workers.worker_log import WorkerLog
from stoker.errors import NotFound
from stoker.ids import ReplicaId, WorkerId


async def lines_of(opened: WorkerLog, tail_lines: int = 100, *, follow: bool = False) -> list[str]:
    """Read a log to its end."""
    return [line async for line in opened.read(tail_lines=tail_lines, follow=follow)]


async def test_lines_are_whole_however_the_output_comes(tmp_path: Path) -> None:
    opened = WorkerLog(tmp_path / "w.log")
    for piece in (b"on", b"e\ntwo\nth", b"ree"):
        opened.write(piece)
    opened.end()

    assert await lines_of(opened) == ["one", "two", "three"]
    assert (tmp_path / "w.log").read_bytes() == b"one\ntwo\nthree"


async def test_the_tail_has_the_last_lines_asked_for(tmp_path: Path) -> None:
    opened = WorkerLog(tmp_path / "w.log")
    opened.write(b"1\n2\n3\n")
    opened.end()

    assert await lines_of(opened, 2) == ["2", "3"]


async def test_a_follower_gets_new_lines_until_the_worker_has_ended(tmp_path: Path) -> None:
    opened = WorkerLog(tmp_path / "w.log")
    opened.write(b"before\n")
    following = asyncio.create_task(lines_of(opened, follow=True))
    await asyncio.sleep(0)
    opened.write(b"after\n")
    opened.end()

    assert await following == ["before", "after"]


async def test_a_follower_that_lags_is_told_how_many_lines_it_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_log, "FOLLOWER_LINES", 2)
    opened = WorkerLog(tmp_path / "w.log")
    following = asyncio.create_task(lines_of(opened, follow=True))
    await asyncio.sleep(0)
    opened.write(b"1\n2\n3\n4\n")
    opened.end()

    assert await following == ["[2 lines left out: this reader is too slow]", "3", "4"]


async def test_an_endless_line_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_log, "MAX_LINE_BYTES", 4)
    opened = WorkerLog(tmp_path / "w.log")
    opened.write(b"abcdefghij")
    opened.end()

    assert await lines_of(opened) == ["abcd", "efgh", "ij"]


def test_the_files_of_a_worker_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_log, "MAX_FILE_BYTES", 100)
    opened = WorkerLog(tmp_path / "w.log")
    for _ in range(50):
        opened.write(b"0123456789\n")
    opened.end()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.log", "w.log.1"]
    assert all(path.stat().st_size <= 100 for path in tmp_path.iterdir())


def test_the_folder_keeps_a_bounded_number_of_files(tmp_path: Path) -> None:
    folder = LogFolder(tmp_path)
    for number in range(KEPT_LOGS + 10):
        folder.open(WorkerId(f"1-{number}")).end()

    assert len(list(tmp_path.iterdir())) <= KEPT_LOGS + 1


def test_a_replicas_log_is_its_workers(tmp_path: Path) -> None:
    folder = LogFolder(tmp_path)
    opened = folder.open(WorkerId("w-1"))
    folder.assign(ReplicaId("rep-1"), WorkerId("w-1"))
    opened.end()

    assert folder.of_replica(ReplicaId("rep-1")) is opened
    with pytest.raises(NotFound):
        folder.of_replica(ReplicaId("rep-2"))
