"""Downloads that end badly: a daemon killed anywhere, a cache's disk that is full."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.store.disk_cache.journal import JOURNAL_NAME, Entry, parse
from stoker.units import KIB
from tests.integration.store.daemon import forked_daemons, running, small_disk
from tests.integration.store.origin_server import OriginServer, origin_server
from tests.integration.store.test_faults import attached, logged
from tests.integration.store.test_remote import WEIGHTS, copies, load, pull, whole_folders
from tests.integration.store.test_store import SECONDS, contents, files, write_checkpoint

CHUNK = 16 * KIB
KILLS = 20
HEADER_BYTES = 256 * KIB
"""Read before a download begins, where nothing is on disk."""


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[OriginServer]:
    folder = write_checkpoint(tmp_path / "origin", sizes=[200_000, 400_003])
    with origin_server(folder) as server:
        yield server


def noted(cache: Path) -> list[Entry]:
    """What the journal of the copy under way says is there."""
    found = list(cache.glob(f"partial/*/{JOURNAL_NAME}"))
    return list(parse(found[0].read_bytes())) if found else []


def check_what_is_noted(cache: Path, expected: bytes) -> int:
    """The bytes that a new daemon would believe are the origin's; returns how many these are."""
    entries = noted(cache)
    for entry in entries:
        assert entry.there
        with next(cache.glob(f"partial/*/{entry.file}")).open("rb") as file:
            file.seek(entry.begin)
            assert file.read(entry.end - entry.begin) == expected[entry.begin : entry.end]
    return sum(entry.end - entry.begin for entry in entries)


def wait_until_something_is_noted(cache: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not noted(cache):
        assert time.monotonic() < deadline, "nothing landed"
        time.sleep(0.005)


def test_a_daemon_killed_anywhere_in_a_download_fetches_only_what_is_missing(
    origin: OriginServer, tmp_path: Path
):
    """20 seeded points, by bytes received; each daemon goes on where the last one was killed."""
    random_ = random.Random(20)
    expected = (origin.folder / WEIGHTS).read_bytes()
    cache, run_dir = tmp_path / "cache", tmp_path / "run"
    settings = {"cache_dir": cache, "chunk_bytes": CHUNK, "far_threads": 2, "fault_in": "lazy"}
    there, resumed = 0, 0
    with forked_daemons(run_dir, pool_bytes=64 * CHUNK, **settings) as start:
        for kill in range(KILLS):
            if len(expected) - there < 8 * CHUNK:  # begin anew, or the last kills would all hit its end
                shutil.rmtree(cache)
                there = 0
            origin.held.clear()
            origin.let_go.clear()
            point = random_.randrange(4 * CHUNK, len(expected) - there)
            origin.hold_after = origin.weights_sent() + (0 if cache.exists() else HEADER_BYTES) + point
            daemon = start()
            attachment = attached(run_dir, origin.url)
            assert origin.held.wait(SECONDS)
            if kill % 2:
                wait_until_something_is_noted(cache)
            os.kill(daemon, signal.SIGKILL)
            origin.let_go.set()
            attachment.close()
            there = check_what_is_noted(cache, expected)
            resumed += there > 0

        origin.settle()
        origin.hold_after = None
        before = origin.weights_sent()
        start()
        with attached(run_dir, origin.url) as again:
            again.wait_all(timeout_seconds=SECONDS)
            assert contents(again)[WEIGHTS] == expected
        assert origin.weights_sent() - before == len(expected) - there
        assert resumed >= KILLS // 2

    with running(run_dir, pool_bytes=64 * CHUNK, **settings) as daemon:
        pull(daemon, origin.url)
    (folder,) = whole_folders(cache)
    assert files(folder)[WEIGHTS] == expected


def test_a_cache_on_a_full_disk_costs_the_copy_until_there_is_room(origin: OriginServer, tmp_path: Path):
    with small_disk(tmp_path / "disk", "size=400k") as disk:
        settings = {"cache_dir": disk / "cache", "cache_bytes": 10_000_000, "chunk_bytes": CHUNK}
        with running(tmp_path / "run", **settings) as daemon:
            with load(daemon, origin.url) as one:
                assert contents(one) == files(origin.folder)
            with pytest.raises(Exception, match="No space left on device; free space and pull again"):
                pull(daemon, origin.url)
            (event, *_) = logged(daemon, "landing.stopped")
            assert event["reason"] == "No space left on device"
            assert not copies(daemon)[0].whole

            subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
            pull(daemon, origin.url)
            (copy,) = copies(daemon)
            assert copy.whole
            assert files(Path(copy.folder)) == files(origin.folder)


def test_a_cache_without_room_for_a_header_costs_the_copy_and_not_the_load(
    origin: OriginServer, tmp_path: Path
):
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        with running(tmp_path / "run", cache_dir=disk / "cache", cache_bytes=10_000_000) as daemon:
            (disk / "ballast").write_bytes(bytes(64 * KIB - 4 * KIB))
            with load(daemon, origin.url) as one:
                assert contents(one) == files(origin.folder)
        assert "No space left on device" in logged(daemon, "cache.no_room")[0]["reason"]
