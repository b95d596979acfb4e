"""The folders of the disk cache under clocks that jump, copies that go while they land, disks that refuse."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.store.disk_cache.cache import CachedFolder, DiskCache
from services.store.disk_cache.record import RECORD_NAME, OriginRecord, render
from services.store.origins.origin import RemoteFile
from stoker.errors import ConfigError

NAME = "model.safetensors"
SIZE = 100


def adopted(cache: DiskCache, uri: str) -> CachedFolder:
    """A copy under way that has room in the cache."""
    record = OriginRecord(
        uri=uri, revision="r", files={NAME: RemoteFile(name=NAME, size_bytes=SIZE, version="v")}
    )
    staged = cache.staging()
    (staged / NAME).write_bytes(bytes(SIZE))
    (staged / RECORD_NAME).write_bytes(render(record))
    cached = cache.adopt(staged, record, [NAME], 1.0)
    assert isinstance(cached, CachedFolder)
    return cached


def land(cached: CachedFolder) -> None:
    """All its bytes arrive."""
    assert cached.partial is not None
    cached.partial.land(NAME, [memoryview(bytearray(b"x" * SIZE))], 0, SIZE)


@pytest.mark.parametrize("jump_seconds", [-1e9, 1e9])
def test_a_clock_that_jumps_costs_no_copy_but_for_room(tmp_path: Path, jump_seconds: float) -> None:
    now = [1_800_000_000.0]
    cache = DiskCache(tmp_path, quota_bytes=2 * SIZE, unix_seconds=lambda: now[0])
    adopted(cache, "s3://b/one")
    now[0] += jump_seconds
    two = adopted(cache, "s3://b/two")
    cache.used(two)
    cache.hold(two, 1)
    assert {each.record.uri for each in cache.folders()} == {"s3://b/one", "s3://b/two"}
    adopted(cache, "s3://b/three")

    assert {each.record.uri for each in cache.folders()} == {"s3://b/two", "s3://b/three"}
    cache.close()


def test_copies_used_in_the_future_or_at_no_time_are_found_at_the_next_start(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, quota_bytes=10 * SIZE)
    for uri, seconds in (("s3://b/future", 4_000_000_000), ("s3://b/never", 0)):
        cached = adopted(cache, uri)
        land(cached)
        os.utime(cache.folder_of(cached) / RECORD_NAME, (seconds, seconds))
    cache.close()
    again = DiskCache(tmp_path, quota_bytes=10 * SIZE)

    assert [(each.record.uri, each.whole) for each in again.folders()] == [
        ("s3://b/never", True),
        ("s3://b/future", True),
    ]
    again.close()


def test_what_lands_in_a_copy_that_was_evicted_is_not_in_the_next_one(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, quota_bytes=10 * SIZE)
    first = adopted(cache, "s3://b/m")
    cache.evict("s3://b/m")
    second = adopted(cache, "s3://b/m")
    land(first)

    assert (first.whole, second.whole, second.partial and second.partial.bytes_there()) == (False, False, 0)
    land(second)
    assert second.whole
    assert (cache.folder_of(second) / NAME).read_bytes() == b"x" * SIZE
    cache.close()


def test_wrong_bytes_bring_a_whole_copy_back_among_those_under_way(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, quota_bytes=10 * SIZE)
    cached = adopted(cache, "s3://b/m")
    land(cached)
    before = len(list(Path("/proc/self/fd").iterdir()))
    cache.forget_bytes(cache.folder_of(cached) / NAME, [(10, 20)])

    assert not cached.whole
    assert cached.partial is not None
    assert cached.partial.bytes_there() == SIZE - 10
    assert len(list(Path("/proc/self/fd").iterdir())) == before  # the descriptors of its first life are gone
    land(cached)
    assert cached.whole
    cache.close()


def test_a_copy_that_cannot_be_reopened_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digests still keep the wrong bytes from being served."""
    cache = DiskCache(tmp_path, quota_bytes=10 * SIZE)
    cached = adopted(cache, "s3://b/m")
    land(cached)

    def refuse(*_args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    cache.forget_bytes(cache.folder_of(cached) / NAME, [(10, 20)])
    monkeypatch.undo()

    assert cached.whole
    assert (cache.folder_of(cached) / NAME).is_file()
    cache.close()


def test_a_cache_that_cannot_be_looked_through_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DiskCache(tmp_path, quota_bytes=SIZE).close()

    def refuse(_self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ConfigError, match=f"{tmp_path}.*Permission denied.*STOKER_STORE_CACHE_DIR"):
        DiskCache(tmp_path, quota_bytes=SIZE)
