"""Three real daemons and one HTTP origin that counts what it sends."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from stoker.checkpoint.convert import convert
from stoker.cli.free_ports import free_ports
from stoker.units import KIB, MIB
from stoker.v1 import checkpoint_store_pb2 as pb
from tests.integration.store.daemon import Daemon, running
from tests.integration.store.origin_server import origin_server
from tests.unit.services.store.checkpoints import write_checkpoint


def test_three_daemons_that_load_one_checkpoint_read_its_origin_once(tmp_path):
    folder = write_checkpoint(tmp_path / "model", size=2 * MIB)
    size = (folder / "model.safetensors").stat().st_size
    with origin_server(folder) as origin, three_daemons(tmp_path) as daemons:
        with ThreadPoolExecutor(3) as threads:
            replies = list(threads.map(lambda daemon: prefetch(daemon, origin.url), daemons))
        tiers = [{each.tier: each.bytes for each in reply.transfers} for reply in replies]

    assert [sum(tier.values()) for tier in tiers] == [size] * 3
    assert sum(tier.get("remote", 0) for tier in tiers) < 2 * size  # once; a daemon short of time asks itself
    assert origin.weights_sent() < 2.5 * size  # every daemon reads the header by itself


def test_a_daemon_that_is_killed_half_way_is_replaced_and_nobody_starts_again(tmp_path):
    folder = write_checkpoint(tmp_path / "model", size=4 * MIB)
    size = (folder / "model.safetensors").stat().st_size
    reads = itertools.count()
    with origin_server(folder) as origin, three_daemons(tmp_path) as daemons:

        def kill_half_way(_name: str, begin: int) -> None:
            if begin and next(reads) == 16:  # half of the chunks; others are on their way to all three
                daemons[2].process.kill()

        origin.gate = kill_half_way
        with ThreadPoolExecutor(3) as threads:
            loads = [threads.submit(prefetch, daemon, origin.url) for daemon in daemons]
            replies = [load.result() for load in loads[:2]]
            with pytest.raises(grpc.RpcError):
                loads[2].result()
        tiers = [{each.tier: each.bytes for each in reply.transfers} for reply in replies]

    assert [sum(tier.values()) for tier in tiers] == [size, size]
    assert sum(tier.get("remote", 0) for tier in tiers) < 1.5 * size


def test_three_daemons_that_pull_one_checkpoint_to_their_disks_read_its_origin_once(tmp_path, monkeypatch):
    monkeypatch.setattr("stoker.checkpoint.content.CHUNK_BYTES", 256 * KIB)
    folder = tmp_path / "model"  # with digests: who has all of it serves the others
    convert(write_checkpoint(tmp_path / "source", size=2 * MIB), folder)
    size = (folder / "model.safetensors").stat().st_size
    pulls = []
    with three_daemons(tmp_path, cached=True) as daemons, ThreadPoolExecutor(3) as threads:
        with origin_server(folder) as at_once:
            pulls.append(list(threads.map(lambda daemon: pull(daemon, at_once.url), daemons)))
        with origin_server(folder) as one_by_one:
            pulls.append([pull(daemon, one_by_one.url) for daemon in daemons])
        copies = [path.read_bytes() for path in tmp_path.glob("cache-*/checkpoints/*/model.safetensors")]

    assert copies == [(folder / "model.safetensors").read_bytes()] * 6
    for replies in pulls:
        tiers = [{each.tier: each.bytes for each in reply.transfers} for reply in replies]
        assert [sum(tier.values()) for tier in tiers] == [size] * 3
        assert sum(tier.get("remote", 0) for tier in tiers) < 2 * size  # as above


@contextmanager
def three_daemons(folder: Path, *, cached: bool = False) -> Iterator[list[Daemon]]:
    """Daemons that are linked to each other, with a disk cache or without."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
    listed = "[" + ",".join(f'"{address}"' for address in addresses) + "]"
    with ExitStack() as stack:
        daemons = [
            stack.enter_context(
                running(
                    folder / f"run-{number}",
                    pool_bytes=16 * MIB,
                    chunk_bytes=256 * KIB,
                    peer_address=address,
                    peers=listed,
                    **({"cache_dir": folder / f"cache-{number}"} if cached else {}),
                )
            )
            for number, address in enumerate(addresses)
        ]
        for daemon in daemons:
            wait_for_links(daemon, 2)
        yield daemons


def wait_for_links(daemon, count: int) -> None:
    """Return when the daemon has logged so many links to peers."""
    deadline = time.monotonic() + 60
    while daemon.log.read_text().count('"peer.linked"') < count:
        assert time.monotonic() < deadline, daemon.log.read_text()
        time.sleep(0.02)


def prefetch(daemon, uri: str) -> pb.PrefetchResponse:
    """Load a checkpoint with a daemon."""
    with daemon.stub() as stub:
        return stub.Prefetch(pb.PrefetchRequest(uri=uri), timeout=120)


def pull(daemon, uri: str) -> pb.PullProgress:
    """Bring a checkpoint to a daemon's disk; returns what it says at the end."""
    with daemon.stub() as stub:
        return list(stub.Pull(pb.PullRequest(uri=uri), timeout=120))[-1]
