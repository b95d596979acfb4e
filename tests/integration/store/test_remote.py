"""A real daemon and a real HTTP origin: bytes arrive once, land on disk, and survive every fault."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import threading
from collections import deque
from pathlib import Path

import grpc
import pytest

from stoker.attach import attach
from stoker.checkpoint.convert import convert
from stoker.checkpoint.index import open_checkpoint
from stoker.errors import LoadFailed
from stoker.units import KIB, MIB
from stoker.v1 import checkpoint_store_pb2 as pb
from tests.integration.store.daemon import Daemon, running, spawn
from tests.integration.store.origin_server import Fault, OriginServer, origin_server
from tests.integration.store.test_store import (
    SECONDS,
    contents,
    files,
    status,
    wait_for_status,
    write_checkpoint,
)

CHUNK = 64 * KIB
WEIGHTS = "model.safetensors"
daemon_with = functools.partial(running, chunk_bytes=CHUNK, far_threads=4, origin_attempts=2)


@pytest.fixture
def origin(tmp_path):
    folder = write_checkpoint(tmp_path / "origin", sizes=[200_000, 500_003, 300_000])
    with origin_server(folder) as server:
        yield server


def load(daemon: Daemon, uri: str):
    attachment = attach(daemon.attach_socket, uri, holder="test")
    attachment.wait_all(timeout_seconds=SECONDS)
    return attachment


def describe(daemon: Daemon, uri: str):
    with daemon.stub() as stub:
        return stub.Describe(pb.DescribeRequest(uri=uri), timeout=SECONDS)


def evict(daemon: Daemon, uri: str) -> None:
    with daemon.stub() as stub:
        stub.Evict(pb.EvictRequest(uri=uri), timeout=SECONDS)


def stored(now: pb.StoreStatus, uri: str) -> pb.StoredCheckpoint:
    return next(each for each in now.checkpoints if each.checkpoint.uri == uri)


def wait_until_on_disk(daemon: Daemon, uri: str) -> None:
    """Return when the copy is whole: in its place, which is after its last byte."""
    wait_for_status(daemon, lambda _: any(copy.whole for copy in copies(daemon) if copy.uri == uri))


def whole_folders(cache: Path) -> list[Path]:
    return list((cache / "checkpoints").iterdir())


def test_a_remote_checkpoint_is_described_through_its_headers_alone(origin: OriginServer, tmp_path):
    with daemon_with(tmp_path / "run") as daemon:
        info = describe(daemon, origin.url)

        assert (info.uri, info.architecture) == (origin.url, "LlamaForCausalLM")
        assert origin.gets[WEIGHTS] == [(0, 256 * KIB)]
        with daemon.stub() as stub:
            small = list(stub.ReadSmallFiles(pb.ReadSmallFilesRequest(uri=origin.url), timeout=SECONDS))
        assert [each.name for each in small] == ["config.json"]


def test_weights_arrive_once_land_on_disk_and_come_from_there_afterwards(origin: OriginServer, tmp_path):
    size = (origin.folder / WEIGHTS).stat().st_size
    cache = tmp_path / "cache"
    with daemon_with(tmp_path / "run", cache_dir=cache) as daemon:
        with load(daemon, origin.url) as one, load(daemon, origin.url) as two:
            assert contents(one) == contents(two) == files(origin.folder)
        sent = origin.weights_sent()
        assert sent == size + 256 * KIB  # the header was read before
        wait_until_on_disk(daemon, origin.url)
        evict(daemon, origin.url)
        with load(daemon, origin.url) as again:
            assert contents(again) == files(origin.folder)
        assert origin.weights_sent() == sent
        now = status(daemon)
        assert stored(now, origin.url).disk_bytes == size
        assert {"remote", "page_cache"} <= {each.stage for each in now.bandwidths}

    (folder,) = whole_folders(cache)
    assert files(folder) == files(origin.folder)
    assert open_checkpoint(folder).weight_bytes == size  # a checkpoint like any other

    with daemon_with(tmp_path / "run2", cache_dir=cache) as daemon:
        assert stored(status(daemon), origin.url).disk_bytes == size
        with load(daemon, origin.url) as after_restart:
            assert contents(after_restart) == files(origin.folder)
    assert origin.weights_sent() == sent


def test_without_a_cache_folder_weights_go_to_the_pool_only(origin: OriginServer, tmp_path):
    with daemon_with(tmp_path / "run") as daemon, load(daemon, origin.url) as one:
        assert contents(one) == files(origin.folder)
        assert stored(status(daemon), origin.url).disk_bytes == 0
        with pytest.raises(grpc.RpcError, match="no disk cache; set STOKER_STORE_CACHE_DIR"):
            pull(daemon, origin.url)
        with pytest.raises(grpc.RpcError, match="no disk cache; set STOKER_STORE_CACHE_DIR"):
            pin(daemon, origin.url)


def test_every_store_gives_a_checkpoint_the_same_revision(origin: OriginServer, tmp_path):
    with daemon_with(tmp_path / "a") as one, daemon_with(tmp_path / "b", cache_dir=tmp_path / "c") as two:
        first = describe(one, origin.url).revision
        assert describe(two, origin.url).revision == first
        (origin.folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "vocab_size": 9}')
        assert describe(one, origin.url).revision == describe(two, origin.url).revision != first


@pytest.fixture
def converted(tmp_path):
    """A converted checkpoint: it has digests."""
    source = write_checkpoint(tmp_path / "source", sizes=[200_000, 500_003, 300_000])
    convert(source, tmp_path / "converted")
    with origin_server(tmp_path / "converted") as server:
        yield server


def test_a_converted_checkpoint_keeps_its_revision_and_its_digests(converted: OriginServer, tmp_path):
    with daemon_with(tmp_path / "run", cache_dir=tmp_path / "cache", chunk_bytes=16 * MIB) as daemon:
        assert describe(daemon, converted.url).revision == open_checkpoint(converted.folder).revision
        with load(daemon, converted.url) as one:
            assert contents(one) == files(converted.folder)


@pytest.mark.parametrize("chunk_bytes", [CHUNK, 16 * MIB])
def test_wrong_bytes_are_never_served_nor_kept(converted: OriginServer, tmp_path, chunk_bytes: int):
    with daemon_with(tmp_path / "run", cache_dir=tmp_path / "cache", chunk_bytes=chunk_bytes) as daemon:
        describe(daemon, converted.url)
        converted.always[WEIGHTS] = Fault(wrong=True)
        with attach(daemon.attach_socket, converted.url, holder="test") as waiting:
            with pytest.raises(LoadFailed, match=r"digest"):
                waiting.wait_all(timeout_seconds=SECONDS)
            assert waiting.ready_bytes(0) == 0
        del converted.always[WEIGHTS]
        with load(daemon, converted.url) as one:
            assert contents(one) == files(converted.folder)
        assert '"damaged": true' in daemon.log.read_text()


def test_a_load_survives_an_origin_that_stumbles(origin: OriginServer, tmp_path):
    with daemon_with(tmp_path / "run") as daemon:
        describe(daemon, origin.url)
        origin.faults[WEIGHTS] = deque(
            [Fault(status=500), Fault(cut_after=10_000), Fault(status=429, retry_after="0")]
        )
        with load(daemon, origin.url) as one:
            assert contents(one) == files(origin.folder)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=403), "answers 403"),
        (Fault(status=404), "no such file"),
        (Fault(whole=True), "ignores Range"),
        (Fault(status=503, retry_after="0"), "answers 503"),
    ],
)
def test_a_load_that_cannot_come_says_why(origin: OriginServer, tmp_path, fault: Fault, message: str):
    with daemon_with(tmp_path / "run") as daemon:
        describe(daemon, origin.url)
        origin.always[WEIGHTS] = fault
        with (
            attach(daemon.attach_socket, origin.url, holder="test") as waiting,
            pytest.raises(LoadFailed, match=message),
        ):
            waiting.wait_all(timeout_seconds=SECONDS)


def test_a_checkpoint_behind_a_server_without_ranges_is_refused_when_it_is_deployed(
    origin: OriginServer, tmp_path
):
    origin.always[WEIGHTS] = Fault(whole=True)
    with daemon_with(tmp_path / "run") as daemon, pytest.raises(grpc.RpcError) as caught:
        describe(daemon, origin.url)

    assert "ignores Range" in caught.value.details()


def test_what_the_disk_has_is_served_while_the_origin_is_away(origin: OriginServer, tmp_path):
    with daemon_with(tmp_path / "run", cache_dir=tmp_path / "cache") as daemon:
        load(daemon, origin.url).close()
        wait_until_on_disk(daemon, origin.url)
        shutil.move(origin.folder, tmp_path / "away")
        for name in ("config.json", WEIGHTS):
            origin.heads[name] = 503
        evict(daemon, origin.url)
        with load(daemon, origin.url) as one:
            assert contents(one) == files(tmp_path / "away")


def test_a_full_quota_costs_the_copy_and_not_the_load(origin: OriginServer, tmp_path):
    with daemon_with(tmp_path / "run", cache_dir=tmp_path / "cache", cache_bytes=100_000) as daemon:
        with load(daemon, origin.url) as one:
            assert contents(one) == files(origin.folder)
        assert stored(status(daemon), origin.url).disk_bytes == 0
    assert "cache.no_room" in daemon.log.read_text()


def test_a_shared_folder_is_read_once_and_kept(tmp_path):
    folder = write_checkpoint(tmp_path / "nfs" / "m", sizes=[300_000])
    with daemon_with(
        tmp_path / "run", cache_dir=tmp_path / "cache", shared_roots=f'["{tmp_path / "nfs"}"]'
    ) as daemon:
        with load(daemon, str(folder)) as one:
            assert contents(one) == files(folder)
        wait_until_on_disk(daemon, str(folder))
    (kept,) = whole_folders(tmp_path / "cache")
    assert files(kept) == files(folder)


def test_damage_on_the_cache_s_disk_is_fetched_again(converted: OriginServer, tmp_path):
    settings = {"cache_dir": tmp_path / "cache", "chunk_bytes": 16 * MIB, "verify_disk": "always"}
    with running(tmp_path / "run", **settings) as daemon:
        load(daemon, converted.url).close()
        wait_until_on_disk(daemon, converted.url)
        evict(daemon, converted.url)
        (folder,) = whole_folders(tmp_path / "cache")
        before = (folder / WEIGHTS).stat()
        with (folder / WEIGHTS).open("r+b") as file:
            file.seek(500_000)
            file.write(b"\xff" * 64)
        os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
        with load(daemon, converted.url) as one:
            assert contents(one) == files(converted.folder)
        wait_until_on_disk(daemon, converted.url)
        assert files(folder) == files(converted.folder)


def test_two_daemons_never_share_a_cache_folder(tmp_path):
    with daemon_with(tmp_path / "a", cache_dir=tmp_path / "cache"):
        other = spawn(tmp_path / "b", cache_dir=tmp_path / "cache")
        assert other.process.wait(SECONDS) != 0
        assert "used by another store daemon" in other.log.read_text()


def test_a_daemon_that_is_stopped_while_the_origin_hangs_ends_in_time(origin: OriginServer, tmp_path):
    hung = threading.Event()
    origin.gate = lambda _name, begin: hung.wait(2 * SECONDS) if begin else None
    with daemon_with(tmp_path / "run", drain_seconds=0.2) as daemon:
        attachment = attach(daemon.attach_socket, origin.url, holder="test")
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.wait(SECONDS)
        hung.set()
        attachment.close()


def pull(daemon: Daemon, uri: str) -> list[pb.PullProgress]:
    with daemon.stub() as stub:
        return list(stub.Pull(pb.PullRequest(uri=uri), timeout=SECONDS))


def pin(daemon: Daemon, uri: str, *, pinned: bool = True) -> None:
    with daemon.stub() as stub:
        stub.PinCopy(pb.PinCopyRequest(uri=uri, pinned=pinned), timeout=SECONDS)


def copies(daemon: Daemon) -> list[pb.Copy]:
    with daemon.stub() as stub:
        return list(stub.ListCopies(pb.ListCopiesRequest(), timeout=SECONDS).copies)


def test_a_pull_brings_a_checkpoint_to_the_disk_past_the_pool(converted: OriginServer, tmp_path):
    size = (converted.folder / WEIGHTS).stat().st_size
    with daemon_with(tmp_path / "run", cache_dir=tmp_path / "cache", pool_bytes=CHUNK) as daemon:
        last = pull(daemon, converted.url)[-1]
        assert (last.disk_bytes, last.total_bytes) == (size, size)
        assert sum(each.bytes for each in last.transfers) == size
        (copy,) = copies(daemon)
        assert (copy.uri, copy.disk_bytes, copy.in_use) == (converted.url, size, False)
        assert files(Path(copy.folder)) == files(converted.folder)
        sent = converted.weights_sent()
        assert pull(daemon, converted.url)[-1].disk_bytes == size
        assert converted.weights_sent() == sent


def test_a_pull_keeps_to_the_pace_of_its_tier(converted: OriginServer, tmp_path):
    """What it tells of its origin is learnt from: an origin that is slowed down must look slow."""
    size = (converted.folder / WEIGHTS).stat().st_size
    pace = json.dumps({"remote": size / 0.4})
    with daemon_with(tmp_path / "run", cache_dir=tmp_path / "cache", paced_bytes_per_second=pace) as daemon:
        (transfer,) = pull(daemon, converted.url)[-1].transfers

        assert (transfer.bytes, transfer.seconds > 0.2) == (size, True)


def test_a_checkpoint_that_had_no_room_on_disk_is_kept_once_there_is_some(origin: OriginServer, tmp_path):
    other, size = f"{origin.url}/other", (origin.folder / WEIGHTS).stat().st_size
    with daemon_with(tmp_path / "run", cache_dir=tmp_path / "cache", cache_bytes=size + 1000) as daemon:
        pull(daemon, origin.url)
        pin(daemon, origin.url)
        with pytest.raises(grpc.RpcError, match="are pinned or in use; unpin or evict others"):
            pull(daemon, other)
        pin(daemon, origin.url, pinned=False)

        assert pull(daemon, other)[-1].disk_bytes == size
        assert [copy.uri for copy in copies(daemon)] == [other]


def test_copies_are_pinned_verified_and_evicted(converted: OriginServer, tmp_path):
    with (
        daemon_with(tmp_path / "run", cache_dir=tmp_path / "cache") as daemon,
        daemon.stub() as stub,
    ):
        size = pull(daemon, converted.url)[-1].disk_bytes
        stub.PinCopy(pb.PinCopyRequest(uri=converted.url, pinned=True), timeout=SECONDS)
        with pytest.raises(grpc.RpcError, match="pinned"):
            stub.EvictCopy(pb.EvictCopyRequest(uri=converted.url), timeout=SECONDS)
        stub.PinCopy(pb.PinCopyRequest(uri=converted.url, pinned=False), timeout=SECONDS)

        right = stub.VerifyCopy(pb.VerifyCopyRequest(uri=converted.url), timeout=SECONDS)
        assert right.digests_checked
        assert not right.damaged
        (copy,) = copies(daemon)
        with (Path(copy.folder) / WEIGHTS).open("r+b") as file:
            file.seek(600_000)
            file.write(b"\xff" * 64)
        damaged = stub.VerifyCopy(pb.VerifyCopyRequest(uri=converted.url), timeout=SECONDS).damaged
        assert [part.file for part in damaged] == [WEIGHTS]
        assert copies(daemon)[0].disk_bytes == size - damaged[0].bytes
        with load(daemon, converted.url) as one:
            assert contents(one) == files(converted.folder)

        wait_until_on_disk(daemon, converted.url)
        evicted = stub.EvictCopy(pb.EvictCopyRequest(uri=converted.url), timeout=SECONDS)
        assert evicted.freed_bytes == size
        assert copies(daemon) == []
        evict(daemon, converted.url)
        with load(daemon, converted.url) as one:
            assert contents(one) == files(converted.folder)
