"""A checkpoint that is larger than the pool comes through a window of it, in a real daemon."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from services.worker.weights.arrival import Arrival
from services.worker.weights.arrival_order import arrival_order
from services.worker.weights.device_weights import DeviceWeights
from services.worker.weights.host_copy import HostCopyEngine
from services.worker.weights.pool_lock import lock_pool
from services.worker.weights.weights_gate import WeightsGate
from stoker.attach import Attachment, attach
from stoker.errors import DoesNotFit, LoadFailed
from stoker.units import KIB, MIB
from tests.copy_engines.fake import FakeCopyEngine
from tests.integration.store.daemon import Daemon, running
from tests.integration.store.test_store import SECONDS, status, wait_for_status, write_checkpoint

CHUNK = 64 * KIB
POOL = MIB
SIZES = [300_001, 77, 450_000, 1_000_003, 700_000, 123_457]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with running(tmp_path_factory.mktemp("run"), pool_bytes=POOL, chunk_bytes=CHUNK) as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "large", sizes=SIZES, shards=2)


def window_on(daemon: Daemon, folder) -> Attachment:
    return attach(daemon.attach_socket, str(folder), holder="test", window=True)


def brought(attachment: Attachment, engine, pool=None) -> dict[str, torch.Tensor]:
    """Bring all of it to a device, as a worker does."""
    order = arrival_order(attachment.tensors.values(), files=attachment.file_count)
    weights = DeviceWeights(attachment, order, engine, dtype=torch.float32, pool=pool)
    arrival = Arrival(attachment, order, weights, WeightsGate(order.stages))
    attachment = None
    arrival.start()
    arrival.loaded.result(SECONDS)
    return weights.tensors


def stored(attachment: Attachment, folder) -> dict[str, bytes]:
    """What the files say, by tensor."""
    content = [(folder / attachment.file_name(file)).read_bytes() for file in range(attachment.file_count)]
    return {
        name: content[place.file][place.offset : place.offset + place.nbytes]
        for name, place in attachment.tensors.items()
    }


def all_free(daemon: Daemon) -> bool:
    pool = wait_for_status(daemon, lambda each: each.pool.free_bytes == POOL).pool
    return pool.leased_bytes == 0


@pytest.mark.parametrize("engine", [HostCopyEngine, FakeCopyEngine])
def test_every_tensor_of_a_model_larger_than_the_pool_reaches_the_device_bit_by_bit(daemon, folder, engine):
    attachment = window_on(daemon, folder)
    expected = stored(attachment, folder)
    assert attachment.window_bytes == POOL // 2
    assert status(daemon).pool.free_bytes == POOL // 2

    tensors = brought(attachment, engine())
    del attachment

    assert {name: bytes(tensor.numpy()) for name, tensor in tensors.items()} == expected
    assert all_free(daemon)


def test_two_readers_share_a_window_and_the_one_that_leaves_is_not_waited_for(daemon, folder):
    idle, busy = window_on(daemon, folder), window_on(daemon, folder)
    expected = stored(busy, folder)
    assert status(daemon).pool.free_bytes == POOL // 2
    found = {}
    reader = threading.Thread(target=lambda each: found.update(brought(each, HostCopyEngine())), args=(busy,))
    del busy
    reader.start()
    idle.wait_ready(0, POOL // 2 - CHUNK, timeout_seconds=SECONDS)
    assert idle.ready_bytes(0) <= POOL // 2
    idle.close()
    del idle
    reader.join(SECONDS)

    assert {name: bytes(tensor.numpy()) for name, tensor in found.items()} == expected
    assert all_free(daemon)


def test_a_reader_that_leaves_half_way_gives_the_window_back(daemon, folder):
    attachment = window_on(daemon, folder)
    attachment.wait_ready(0, 3 * CHUNK, timeout_seconds=SECONDS)
    attachment.consumed(0, 2 * CHUNK)
    attachment.close()

    assert all_free(daemon)


def test_a_file_that_breaks_half_way_fails_the_load_and_gives_the_window_back(daemon, tmp_path):
    folder = write_checkpoint(tmp_path / "large", sizes=SIZES)
    attachment = window_on(daemon, folder)
    attachment.wait_ready(0, POOL // 2, timeout_seconds=SECONDS)
    os.truncate(folder / "model.safetensors", POOL)

    with pytest.raises(LoadFailed, match=r"changed while it was read|was cut"):
        brought(attachment, HostCopyEngine())
    attachment.close()
    del attachment
    assert all_free(daemon)


def test_who_does_not_ask_for_a_window_is_refused_as_before(daemon, folder):
    with pytest.raises(DoesNotFit, match="STOKER_STORE_POOL_BYTES"):
        attach(daemon.attach_socket, str(folder), holder="test")

    assert all_free(daemon)


def test_a_reader_that_lies_about_what_it_used_is_let_go(daemon, folder):
    attachment = window_on(daemon, folder)
    attachment.wait_ready(0, CHUNK, timeout_seconds=SECONDS)
    attachment.consumed(0, attachment.file_bytes(0))

    with pytest.raises(LoadFailed, match="closed the connection"):
        attachment.wait_all(timeout_seconds=SECONDS)
    attachment.close()
    assert all_free(daemon)


class Watched(HostCopyEngine):
    """Remembers where copies came from."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def copy(self, destination, source) -> None:
        """See `CopyEngine`."""
        self.ranges.append((source.data_ptr(), source.data_ptr() + source.numel()))
        super().copy(destination, source)


@pytest.mark.parametrize("sizes", [SIZES, SIZES[:2]], ids=["through a window", "whole"])
def test_a_pool_that_was_locked_before_is_what_every_copy_comes_from(daemon, tmp_path, sizes):
    pool = lock_pool(daemon.attach_socket, FakeCopyEngine())
    folder = write_checkpoint(tmp_path / "model", sizes=sizes)
    attachment = window_on(daemon, folder)
    expected = stored(attachment, folder)
    engine = Watched()

    tensors = brought(attachment, engine, pool)
    del attachment

    ((first, last),) = pool.ranges
    assert {name: bytes(tensor.numpy()) for name, tensor in tensors.items()} == expected
    assert all(first <= begin and end <= last for begin, end in engine.ranges)
