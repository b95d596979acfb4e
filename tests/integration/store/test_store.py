"""A real store daemon: bytes, leases, faults, ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from stoker import rpc
from stoker.attach import attach
from stoker.errors import CallerError, CapacityError, CheckpointInvalid, DoesNotFit, LoadFailed, NotFound
from stoker.units import KIB, MIB
from stoker.v1 import checkpoint_store_pb2 as pb
from tests.integration.store.daemon import Daemon, running, spawn

SECONDS = 60.0
"""Ends what would hang; passing tests never come near."""


def write_checkpoint(folder: Path, *, sizes: list[int], shards: int = 1) -> Path:
    """A checkpoint in place: tensors `layers.<n>.w` of these many random bytes, dealt out to shards."""
    folder.mkdir(parents=True)
    weight_map = {}
    for shard in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{shard}.safetensors"
        table, at = {}, 0
        for number in range(shard, len(sizes), shards):
            tensor = f"model.layers.{number}.w"
            table[tensor] = {
                "dtype": "U8",
                "shape": [sizes[number]],
                "data_offsets": [at, at + sizes[number]],
            }
            weight_map[tensor] = name
            at += sizes[number]
        header = json.dumps(table).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + os.urandom(at))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return folder


def contents(attachment) -> dict[str, bytes]:
    return {
        attachment.file_name(file): bytes(attachment.buffer(file)) for file in range(attachment.file_count)
    }


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def load(daemon: Daemon, folder: Path):
    """Attach and wait for everything."""
    attachment = attach(daemon.attach_socket, str(folder), holder="test")
    attachment.wait_all(timeout_seconds=SECONDS)
    return attachment


def status(daemon: Daemon) -> pb.StoreStatus:
    with daemon.stub() as stub:
        return stub.GetStatus(pb.GetStatusRequest(), timeout=SECONDS)


def wait_for_status(daemon: Daemon, wanted) -> pb.StoreStatus:
    """The first status that satisfies `wanted`, by watching."""
    with daemon.stub() as stub:
        for each in stub.WatchStatus(pb.GetStatusRequest(), timeout=SECONDS):
            if wanted(each):
                return each
    raise AssertionError("the watch ended")


def loads_logged(daemon: Daemon) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    return [line for line in lines if line["event"] == "checkpoint.loaded"]


@pytest.fixture
def daemon(tmp_path):
    with running(tmp_path / "run", chunk_bytes=64 * KIB, pool_bytes=4 * MIB) as started:
        yield started


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [
        ([1], 1),
        ([64 * KIB - 100, 4096, 3, 0, 100_001], 1),
        ([4096 * 16] * 3, 3),
        ([999_999, 5, 70_000, 1, 12_345], 4),
    ],
)
def test_what_a_worker_maps_is_the_files_byte_for_byte(daemon, tmp_path, sizes, shards):
    folder = write_checkpoint(tmp_path / "m", sizes=sizes, shards=shards)
    with load(daemon, folder) as attachment:
        assert contents(attachment) == files(folder)
        for tensor in attachment.tensors.values():
            assert len(attachment.buffer(tensor.file, tensor.offset, tensor.nbytes)) == tensor.nbytes


def test_a_checkpoint_without_a_tensor_attaches(daemon, tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[])
    with load(daemon, folder) as attachment:
        assert contents(attachment) == files(folder)
        assert attachment.tensors == {}


def test_a_second_worker_finds_it_in_memory_and_nothing_is_read_twice(daemon, tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[500_000])
    size = (folder / "model.safetensors").stat().st_size
    first, second = load(daemon, folder), load(daemon, folder)

    assert (first.tier, second.tier) == ("disk", "dram")
    assert [(each["bytes"], each["seconds"] > 0) for each in loads_logged(daemon)] == [(size, True)]
    assert status(daemon).checkpoints[0].leases == 2


def test_many_at_once_cause_one_load(daemon, tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[900_000])
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(bytes(load(daemon, folder).buffer(0)))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)

    assert found == [files(folder)["model.safetensors"]] * 8
    assert len(loads_logged(daemon)) == 1


WORKER = """
import sys
from stoker.attach import attach
attachment = attach(sys.argv[1], sys.argv[2], holder="worker")
attachment.wait_all(timeout_seconds=20)
print("attached", flush=True)
sys.stdin.read()
"""


def test_a_killed_worker_loses_its_lease_at_once(daemon, tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[300_000])
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, daemon.attach_socket, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    with worker:
        assert worker.stdout.readline() == b"attached\n"
        wait_for_status(daemon, lambda now: now.checkpoints[0].leases == 1)
        with daemon.stub() as stub, pytest.raises(grpc.RpcError) as refused:
            stub.Evict(pb.EvictRequest(uri=str(folder)), timeout=SECONDS)
        worker.kill()

    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    wait_for_status(daemon, lambda now: now.checkpoints[0].leases == 0)
    with daemon.stub() as stub:
        assert stub.Evict(pb.EvictRequest(uri=str(folder)), timeout=SECONDS).freed_bytes == 5 * 64 * KIB


def test_workers_keep_their_memory_when_the_daemon_is_killed_and_a_new_one_serves_on(tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[300_000])
    expected = files(folder)
    with running(tmp_path / "run") as first:
        attachment = load(first, folder)
        first.kill()
        assert (tmp_path / "run" / "attach.sock").exists()

    with running(tmp_path / "run") as second:
        assert contents(load(second, folder)) == expected
        assert contents(attachment) == expected


def test_a_load_that_loses_its_daemon_fails_with_a_reason(tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[300_000])
    with running(tmp_path / "run") as daemon:
        attachment = attach(daemon.attach_socket, str(folder), holder="test")
        daemon.process.send_signal(signal.SIGSTOP)
        result: list[BaseException] = []

        def wait() -> None:
            try:
                while True:
                    attachment._receive(lambda: False, SECONDS)
            except LoadFailed as error:
                result.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        daemon.kill()
        waiting.join(SECONDS)

        assert "went away" in str(result[0])


def test_a_checkpoint_larger_than_the_pool_is_refused_with_sizes(daemon, tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[5_000_000])

    with pytest.raises(DoesNotFit, match=r"takes 5\.0 MB, the store's whole pool has 4\.2 MB.*POOL_BYTES"):
        load(daemon, folder)
    assert status(daemon).pool.free_bytes == 4 * MIB


def test_a_full_pool_makes_room_but_not_from_those_in_use(daemon, tmp_path):
    a, b, c = (write_checkpoint(tmp_path / name, sizes=[1_900_000]) for name in "abc")
    kept = load(daemon, a)
    load(daemon, b).close()
    wait_for_status(daemon, lambda now: sum(each.leases for each in now.checkpoints) == 1)
    load(daemon, c).close()
    wait_for_status(daemon, lambda now: sum(each.leases for each in now.checkpoints) == 1)

    held = {Path(each.checkpoint.uri).name: each.dram_bytes for each in status(daemon).checkpoints}
    assert (held["b"], held["a"] > 0, held["c"] > 0) == (0, True, True)
    also_kept = load(daemon, c)
    with pytest.raises(CapacityError, match="held by running models"):
        load(daemon, b)
    kept.close()
    also_kept.close()


def test_a_file_cut_while_it_is_read_is_a_failed_load_for_all_who_wait_and_not_for_the_daemon(tmp_path):
    """Small reads by one thread from a slow disk, stopped by a signal soon: the cut falls between."""
    folder = write_checkpoint(tmp_path / "m", sizes=[50_000_000])
    other = write_checkpoint(tmp_path / "other", sizes=[100_000])
    slow = {"chunk_bytes": 16 * KIB, "read_threads": 1, "paced_bytes_per_second": '{"disk": 5000000}'}
    with running(tmp_path / "run", pool_bytes=64 * MIB, **slow) as daemon:
        waiting = [attach(daemon.attach_socket, str(folder), holder="test") for _ in range(2)]
        daemon.process.send_signal(signal.SIGSTOP)
        os.truncate(folder / "model.safetensors", 10_000)
        daemon.process.send_signal(signal.SIGCONT)
        for attachment in waiting:
            with pytest.raises(LoadFailed, match=r"changed|cut"):
                attachment.wait_all(timeout_seconds=SECONDS)

        freed = wait_for_status(daemon, lambda now: now.pool.free_bytes == now.pool.total_bytes)
        assert not any(each.dram_bytes for each in freed.checkpoints)
        assert contents(load(daemon, other)) == files(other)


def test_the_rate_of_the_disk_is_known_before_anything_was_loaded(tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[9_000_000])
    paced = {"probe_bytes": 8 * MIB, "paced_bytes_per_second": '{"disk": 40000000}'}
    with running(tmp_path / "run", **paced) as daemon:
        with daemon.stub() as stub:
            stub.Describe(pb.DescribeRequest(uri=str(folder)), timeout=SECONDS)
        now = wait_for_status(daemon, lambda now: len(now.bandwidths) > 0)

        assert all(0 < each.bytes_per_second <= 40_400_000 for each in now.bandwidths)
        assert now.pool.free_bytes == now.pool.total_bytes


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("relative", CallerError),
        ("/no/such/folder", NotFound),
        ("/", CheckpointInvalid),
    ],
)
def test_what_cannot_be_served_is_refused_the_same_way_on_both_doors(daemon, uri, kind):
    with pytest.raises(kind) as by_socket:
        attach(daemon.attach_socket, uri, holder="test")
    with daemon.stub() as stub, pytest.raises(grpc.RpcError) as by_grpc:
        stub.Describe(pb.DescribeRequest(uri=uri), timeout=SECONDS)

    assert rpc.from_rpc_error(by_grpc.value, "store").message == by_socket.value.message


def test_another_revision_is_refused(daemon, tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[10])

    with pytest.raises(CheckpointInvalid, match="asked for was old"):
        attach(daemon.attach_socket, str(folder), revision="old", holder="test")


def test_a_client_that_speaks_another_protocol_is_let_go(daemon, tmp_path):
    for noise in (b"GET / HTTP/1.1\r\n\r\n", struct.pack("<I", 3) + b"\xff\xff\xff", b"\x01"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(daemon.attach_socket)
            client.sendall(noise)
            client.shutdown(socket.SHUT_WR)
            client.settimeout(SECONDS)
            with suppress(ConnectionResetError):  # what it had not read yet
                assert client.recv(100) == b""

    folder = write_checkpoint(tmp_path / "m", sizes=[10])
    assert contents(load(daemon, folder)) == files(folder)


def test_a_prefetch_brings_it_and_says_from_where(daemon, tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[700_000])
    size = (folder / "model.safetensors").stat().st_size
    with daemon.stub() as stub:
        request = pb.PrefetchRequest(uri=str(folder), priority=pb.PRIORITY_PREFETCH)
        first = stub.Prefetch(request, timeout=SECONDS)
        second = stub.Prefetch(request, timeout=SECONDS)

    assert sum(each.bytes for each in first.transfers) == size
    assert [(each.tier, each.bytes) for each in second.transfers] == [("dram", size)]
    assert load(daemon, folder).tier == "dram"


def test_small_files_come_whole_also_when_they_are_large(daemon, tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[10])
    tokenizer = os.urandom(7 * MIB)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    (folder / "merges.txt").write_bytes(b"")
    found: dict[str, bytes] = {}
    ended = []
    with daemon.stub() as stub:
        for piece in stub.ReadSmallFiles(pb.ReadSmallFilesRequest(uri=str(folder)), timeout=SECONDS):
            found[piece.name] = found.get(piece.name, b"") + piece.content
            ended += [piece.name] if piece.last else []

    assert found["tokenizer.json"] == tokenizer
    assert found["merges.txt"] == b""
    assert sorted(ended) == sorted(found)


def test_a_pin_brings_it_and_keeps_it(daemon, tmp_path):
    a, b = (write_checkpoint(tmp_path / name, sizes=[2_500_000]) for name in "ab")
    with daemon.stub() as stub:
        stub.Pin(pb.PinRequest(uri=str(a), pinned=True), timeout=SECONDS)
        wait_for_status(daemon, lambda now: now.checkpoints[0].dram_bytes > 2_500_000)
        with pytest.raises(CapacityError):
            load(daemon, b)
        stub.Pin(pb.PinRequest(uri=str(a), pinned=False), timeout=SECONDS)

    assert contents(load(daemon, b)) == files(b)


def test_two_daemons_on_one_run_folder(daemon):
    second = spawn(daemon.run_dir)

    assert second.process.wait(SECONDS) != 0
    assert f"in use by another checkpoint store (process {daemon.process.pid})" in second.log.read_text()
    assert daemon.process.poll() is None


def test_a_taken_port_is_an_error_that_says_so(daemon, tmp_path):
    second = spawn(tmp_path / "other", address=daemon.address)

    assert second.process.wait(SECONDS) != 0
    assert f"cannot listen on {daemon.address}" in second.log.read_text()
    assert list((tmp_path / "other").iterdir()) == []


def test_an_unknown_setting_is_an_error_that_names_the_near_one(tmp_path):
    second = spawn(tmp_path / "run", pool_byte=5)

    assert second.process.wait(SECONDS) != 0
    assert "did you mean 'pool_bytes'" in second.log.read_text()


def test_sigterm_leaves_nothing_behind_even_with_a_worker_attached(tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[300_000])
    before = set(Path("/dev/shm").iterdir())
    with running(tmp_path / "run") as daemon:
        attachment = load(daemon, folder)

        assert daemon.stop() == 0
        assert list(daemon.run_dir.iterdir()) == []
        assert set(Path("/dev/shm").iterdir()) == before
        assert contents(attachment) == files(folder)


def test_it_serves_before_its_pool_is_faulted_in(tmp_path):
    """A gigabyte takes the kernel most of a second; the first load must not wait for that."""
    folder = write_checkpoint(tmp_path / "m", sizes=[300_000])
    with running(tmp_path / "run", pool_bytes=1024 * MIB) as daemon:
        assert contents(load(daemon, folder)) == files(folder)
        assert daemon.stop() == 0  # the line about a load follows its last byte
    events = [json.loads(line)["event"] for line in daemon.log.read_text().splitlines()]

    assert events.index("service.started") < events.index("checkpoint.loaded")
