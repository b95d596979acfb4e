"""What goes wrong under a real daemon: damaged bytes, lost files, full disks, crashes at any moment."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stoker.attach import Attachment, attach
from stoker.checkpoint.convert import convert
from stoker.checkpoint.layout import CHUNK_BYTES
from stoker.errors import LoadFailed, PeerError, StokerError
from stoker.units import KIB, MIB
from tests.integration.store.daemon import Daemon, forked_daemons, running, small_disk, spawn
from tests.integration.store.test_store import SECONDS, contents, files, load, status, write_checkpoint

WEIGHTS = "model.safetensors"


def logged(daemon: Daemon, event: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in daemon.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


def flip_bit(path: Path, at: int) -> None:
    """Damage a byte as a disk does: no time of the file tells of it but its change time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """Two and a half chunks of digests."""
    folder = tmp_path_factory.mktemp("converted")
    write_checkpoint(folder / "plain", sizes=[MIB] * (5 * CHUNK_BYTES // MIB // 2))
    convert(folder / "plain", folder / "converted")
    return folder / "converted"


# --- damage ---


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, MIB])
def test_damaged_bytes_are_never_ready_whatever_the_size_of_a_chunk(tmp_path, converted, chunk_bytes):
    folder = shutil.copytree(converted, tmp_path / "m")
    other = write_checkpoint(tmp_path / "other", sizes=[100_000])
    flip_bit(folder / WEIGHTS, CHUNK_BYTES + 12_345)
    with running(tmp_path / "run", chunk_bytes=chunk_bytes, pool_bytes=128 * MIB) as daemon:
        attachment = attach(daemon.attach_socket, str(folder), holder="test")
        with pytest.raises(LoadFailed, match=f"is damaged between bytes.*stoker verify {folder}"):
            attachment.wait_all(timeout_seconds=SECONDS)

        assert attachment.ready_bytes(0) <= CHUNK_BYTES
        assert contents(load(daemon, other)) == files(other)
        (event,) = logged(daemon, "chunk.damaged")
        assert event["path"] == str(folder / WEIGHTS)
        assert event["offset_bytes"] == CHUNK_BYTES
        attachment.close()

        shutil.copy(converted / WEIGHTS, folder / WEIGHTS)
        assert contents(load(daemon, folder)) == files(converted)


def test_a_copy_found_sound_is_believed_by_the_next_daemon_until_it_is_written_to(tmp_path, converted):
    folder = shutil.copytree(converted, tmp_path / "m")
    records = tmp_path / "run" / "verified"
    with running(tmp_path / "run", pool_bytes=128 * MIB) as daemon:
        load(daemon, folder).close()
        before = {path.name for path in records.iterdir()}
        daemon.kill()
    with running(tmp_path / "run", pool_bytes=128 * MIB) as daemon:
        load(daemon, folder).close()
        again = {path.name for path in records.iterdir()}
        with daemon.stub() as stub:
            from stoker.v1 import checkpoint_store_pb2 as pb

            stub.Evict(pb.EvictRequest(uri=str(folder)), timeout=SECONDS)
        flip_bit(folder / WEIGHTS, 5)
        flip_bit(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)
        with pytest.raises(StokerError):
            load(daemon, folder)

    assert len(before) == 1
    assert again == before


# --- files that go away ---


@contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        daemon.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("fault", ["deleted", "replaced"])
def test_a_file_that_goes_away_while_it_loads_is_loaded_as_it_was_or_not_at_all(tmp_path, fault):
    folder = write_checkpoint(tmp_path / "m", sizes=[20_000_000])
    expected = files(folder)
    with running(tmp_path / "run", chunk_bytes=16 * KIB, read_threads=1) as daemon:
        attachment = attach(daemon.attach_socket, str(folder), holder="test")
        with stopped(daemon):
            if fault == "deleted":
                (folder / WEIGHTS).unlink()
            else:
                (tmp_path / "new").write_bytes(os.urandom((folder / WEIGHTS).stat().st_size))
                (tmp_path / "new").rename(folder / WEIGHTS)
        try:
            attachment.wait_all(timeout_seconds=SECONDS)
        except LoadFailed as error:
            assert WEIGHTS in error.message  # noqa: PT017 - either way is right, each with its own claim
        else:
            assert contents(attachment) == expected
        ready = attachment.ready_bytes(0)
        assert bytes(attachment.buffer(0, 0, ready)) == expected[WEIGHTS][:ready]
        assert status(daemon).pool.total_bytes


def test_a_file_that_may_not_be_read_any_more_fails_the_load_and_not_the_daemon(tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[100_000])
    other = write_checkpoint(tmp_path / "other", sizes=[100_000])
    obeys_modes = ()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root reads everything, and there is no setpriv to take that right away")
        obeys_modes = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    with running(tmp_path / "run", prefix=obeys_modes) as daemon:
        load(daemon, folder).close()
        with daemon.stub() as stub:
            from stoker.v1 import checkpoint_store_pb2 as pb

            stub.Evict(pb.EvictRequest(uri=str(folder)), timeout=SECONDS)
        (folder / WEIGHTS).chmod(0)
        with pytest.raises(StokerError, match="lacks permission"):
            load(daemon, folder)

        assert contents(load(daemon, other)) == files(other)


# --- full disks ---


def test_a_run_folder_on_a_full_disk_is_an_error_that_says_so_and_is_fine_once_there_is_room(tmp_path):
    with small_disk(tmp_path / "disk", "size=32k") as disk:
        (disk / "ballast").write_bytes(bytes(32 * KIB))
        daemon = spawn(disk / "run")
        assert daemon.process.wait(SECONDS) != 0
        said = (disk / "run.log").read_text() + str(daemon.process.returncode)
        (disk / "ballast").unlink()
        with running(disk / "run") as again:
            assert status(again).pool.total_bytes

    assert said


def test_a_full_disk_costs_the_record_of_a_check_and_no_load(tmp_path, converted):
    with small_disk(tmp_path / "run", "nr_inodes=4") as run_dir:
        (run_dir / "ballast").touch()
        with running(run_dir, pool_bytes=128 * MIB) as daemon:
            assert contents(load(daemon, converted)) == files(converted)
            assert logged(daemon, "verified.not_recorded")[0]["reason"] == "No space left on device"


# --- crashes ---


def attached(run_dir: Path, folder: Path) -> Attachment:
    """Attach as soon as a daemon answers there."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return attach(run_dir / "attach.sock", str(folder), holder="test")
        except PeerError:
            if time.monotonic() > deadline:
                raise


def test_a_daemon_killed_anywhere_in_a_load_leaves_workers_alive_and_nothing_half_done(tmp_path):
    """20 seeded points of a load, each in a daemon of its own on the same run folder."""
    random_ = random.Random(20)
    kept_folder = write_checkpoint(tmp_path / "kept", sizes=[300_000])
    folder = write_checkpoint(tmp_path / "m", sizes=[12_000_000])
    kept_bytes, expected = files(kept_folder), files(folder)[WEIGHTS]
    run_dir = tmp_path / "run"
    settings = {"chunk_bytes": 16 * KIB, "read_threads": 1, "pool_bytes": 16 * MIB, "fault_in": "lazy"}
    survivors = []
    cut_short = 0
    with forked_daemons(run_dir, **settings) as start:
        for _ in range(20):
            daemon = start()
            survivors.append(attached(run_dir, kept_folder))
            survivors[-1].wait_all(timeout_seconds=SECONDS)
            attachment = attached(run_dir, folder)
            point = random_.randrange(len(expected))
            while attachment.ready_bytes(0) < point:
                pass
            os.kill(daemon, signal.SIGSTOP)
            ready = attachment.ready_bytes(0)
            os.kill(daemon, signal.SIGKILL)
            assert bytes(attachment.buffer(0, 0, ready)) == expected[:ready]
            if ready < len(expected):
                cut_short += 1
                with pytest.raises(LoadFailed):
                    attachment.wait_ready(0, len(expected), timeout_seconds=SECONDS)
        start()
        again = attached(run_dir, folder)
        again.wait_all(timeout_seconds=SECONDS)

        assert contents(again)[WEIGHTS] == expected
        assert all(contents(survivor) == kept_bytes for survivor in survivors)
        assert cut_short > 0


# --- one copy for all ---

WORKER = """
import sys
from stoker.attach import Attachment, attach
attachment = attach(sys.argv[1], sys.argv[2], holder="worker")
attachment.wait_all(timeout_seconds=20)
total = sum(bytes(attachment.buffer(0))[::4096])
print(attachment.address(0), attachment.file_bytes(0), flush=True)
sys.stdin.read()
"""


def shares(pid: int, begin: int, end: int) -> dict[str, int]:
    """What smaps says of a range of a process's memory, in bytes."""
    found = dict.fromkeys(("Rss", "Pss", "Private_Dirty", "Private_Clean"), 0)
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            low, _, high = first.partition("-")
            inside = int(low, 16) < end and int(high, 16) > begin
        elif inside and first[:-1] in found:
            found[first[:-1]] += int(rest.split()[0]) * KIB
    return found


def test_four_workers_on_a_host_hold_one_copy(tmp_path):
    folder = write_checkpoint(tmp_path / "m", sizes=[30_000_000])
    command = [sys.executable, "-c", WORKER]
    with running(tmp_path / "run", pool_bytes=64 * MIB) as daemon:
        load(daemon, folder).close()
        workers = [
            subprocess.Popen(
                [*command, daemon.attach_socket, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=Path(__file__).parents[3],
            )
            for _ in range(4)
        ]
        try:
            places = [tuple(map(int, worker.stdout.readline().split())) for worker in workers]
            held = [
                shares(worker.pid, begin, begin + size)
                for worker, (begin, size) in zip(workers, places, strict=True)
            ]
        finally:
            for worker in workers:
                worker.stdin.close()
                worker.wait(SECONDS)
                worker.stdout.close()

    size = places[0][1]
    assert all(each["Rss"] >= size for each in held), "every worker sees all of it"
    assert sum(each["Pss"] for each in held) <= 1.3 * size, "together they hold one copy"
    assert all(each["Private_Dirty"] + each["Private_Clean"] < size / 100 for each in held)
