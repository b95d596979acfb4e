"""An attachment: mapping, waiting, failing, ending; the store is a fake that speaks the same messages."""

from __future__ import annotations

import gc
import mmap
import os
import struct
import threading
from collections.abc import Iterable

import pytest
import torch

from stoker.attach import Attachment
from stoker.attach.attachment import Run, runs
from stoker.attach.tensors import tensor, tensors
from stoker.checkpoint.dtypes import DTYPE_BITS
from stoker.errors import CheckpointInvalid, DeadlineExceeded, InvalidRequest, LoadFailed, PeerError
from stoker.v1 import checkpoint_store_pb2 as pb

CHUNK = mmap.PAGESIZE


class FakeConnection:
    """A connection whose messages the test gives; `closed` tells whether anybody still holds the lease."""

    def __init__(self, store: FakeStore) -> None:
        self._store = store
        store.leases += 1

    def __del__(self) -> None:
        self._store.leases -= 1

    def next_event(self, *, timeout_seconds: float | None) -> pb.AttachProgress:
        """Return the next scripted message."""
        step = next(self._store.script, None)
        if step is None:
            raise DeadlineExceeded("nothing came")
        if isinstance(step, Exception):
            raise step
        return step()


class FakeStore:
    """An arena of eight pages and two counters."""

    def __init__(self, script: Iterable[object] = ()) -> None:
        self.arena = os.memfd_create("arena")
        os.ftruncate(self.arena, 8 * CHUNK)
        self.counters = os.memfd_create("counters")
        os.ftruncate(self.counters, mmap.PAGESIZE)
        self.script = iter(script)
        self.leases = 0

    def put(self, content: bytes, chunks: list[int]) -> None:
        """Write a file's bytes into its chunks."""
        for at, chunk in enumerate(chunks):
            os.pwrite(self.arena, content[at * CHUNK : (at + 1) * CHUNK], chunk * CHUNK)

    def ready(self, count: int, *, file: int = 0) -> pb.AttachProgress:
        """Move a file's counter and tell of it."""
        os.pwrite(self.counters, struct.pack("<Q", count), file * 8)
        return pb.AttachProgress(file_ready=pb.FileReady(file=file, bytes=count))

    def attach(self, size: int, chunks: list[int], *, tensors=(), tied=()) -> Attachment:
        """An attachment to one file."""
        attached = pb.Attached(
            arena_bytes=8 * CHUNK,
            chunk_bytes=CHUNK,
            files=[pb.AttachedFile(name="f", bytes=size, chunk_offsets=[chunk * CHUNK for chunk in chunks])],
            tensors=tensors,
            tied=[pb.TiedTensors(names=names) for names in tied],
        )
        connection = FakeConnection(self)
        return Attachment(
            connection, attached, (self.arena, self.counters), connect_seconds=0.0, reply_seconds=0.0
        )


@pytest.fixture
def store():
    made = FakeStore()
    yield made
    os.close(made.arena)
    os.close(made.counters)


def done() -> pb.AttachProgress:
    return pb.AttachProgress(done=pb.AttachDone(seconds=1.5))


def failed() -> pb.AttachProgress:
    return pb.AttachProgress(failed=pb.AttachFailed(code="load_failed", message="disk broke"))


def test_neighbouring_chunks_are_one_mapping():
    assert runs([2 * CHUNK, 3 * CHUNK, 0, 5 * CHUNK, 6 * CHUNK], CHUNK) == [
        Run(at=0, offset=2 * CHUNK, length=2 * CHUNK),
        Run(at=2 * CHUNK, offset=0, length=CHUNK),
        Run(at=3 * CHUNK, offset=5 * CHUNK, length=2 * CHUNK),
    ]


def test_a_scattered_file_of_odd_size_reads_as_one_buffer(store):
    content = os.urandom(3 * CHUNK - 7)
    store.put(content, [5, 0, 6])

    assert bytes(store.attach(len(content), [5, 0, 6]).buffer(0)) == content


def test_an_empty_file_is_an_empty_buffer(store):
    assert bytes(store.attach(0, []).buffer(0)) == b""


def test_waiting_for_what_is_there_asks_nobody(store):
    attachment = store.attach(100, [0])
    store.ready(60)

    attachment.wait_ready(0, 60)
    assert attachment.ready_bytes(0) == 60


def test_waiting_ends_with_the_message_that_brings_the_bytes(store):
    seen = []
    store.script = iter([lambda: seen.append(1) or store.ready(40), lambda: store.ready(90), done])

    store.attach(100, [0]).wait_ready(0, 80)

    assert seen == [1]


def test_everything_is_there_when_the_store_says_done(store):
    store.script = iter([lambda: store.ready(100), done])

    assert store.attach(100, [0]).wait_all().seconds == 1.5


def test_a_failed_load_says_the_stores_reason_and_goes_on_saying_it(store):
    store.script = iter([failed])
    attachment = store.attach(100, [0])

    for _ in range(2):
        with pytest.raises(LoadFailed, match="disk broke"):
            attachment.wait_ready(0, 1)


def test_a_store_that_goes_away_during_the_load_fails_it(store):
    store.script = iter([LoadFailed("the checkpoint store went away while it was loading")])

    with pytest.raises(LoadFailed, match="went away"):
        store.attach(100, [0]).wait_all()


def test_a_wait_that_takes_too_long_can_be_repeated(store):
    attachment = store.attach(100, [0])
    with pytest.raises(DeadlineExceeded):
        attachment.wait_ready(0, 100, timeout_seconds=0)
    store.script = iter([lambda: store.ready(100)])

    attachment.wait_ready(0, 100)


def test_two_threads_may_wait_at_once(store):
    store.script = iter([lambda: store.ready(50), lambda: store.ready(100), done])
    attachment = store.attach(100, [0])
    other = threading.Thread(target=attachment.wait_all)
    other.start()
    attachment.wait_ready(0, 100)
    other.join(10)

    assert not other.is_alive()


def test_bytes_outside_of_the_file_are_refused(store):
    attachment = store.attach(100, [0])

    with pytest.raises(InvalidRequest, match="outside"):
        attachment.buffer(0, 50, 51)
    with pytest.raises(InvalidRequest, match="fewer than 101"):
        attachment.wait_ready(0, 101)


def test_the_lease_ends_with_close_when_no_view_is_left(store):
    attachment = store.attach(100, [0])
    attachment.close()
    gc.collect()

    assert store.leases == 0


def test_the_lease_outlives_close_while_a_tensor_shows_the_memory(store):
    """Otherwise the chunk could be given to another checkpoint under a living tensor."""
    described = pb.AttachedTensor(name="t", dtype="U8", shape=[100], offset=0, bytes=100)
    with store.attach(100, [0], tensors=[described]) as attachment:
        found = tensor(attachment, "t")
    gc.collect()
    assert store.leases == 1

    del found, attachment
    gc.collect()
    assert store.leases == 0


def test_a_closed_attachment_says_so(store):
    attachment = store.attach(100, [0])
    attachment.close()
    attachment.close()

    with pytest.raises(LoadFailed, match="closed"):
        attachment.wait_all()


CASES = [
    (dtype, shape)
    for dtype in DTYPE_BITS
    for shape in [(), (3,), (2, 4), (0, 5), (0, 4)]
    if not dtype.startswith("F6") and (dtype != "F4" or (shape and shape[-1] % 2 == 0))
]
"""torch has no 6-bit floats, and packs two 4-bit ones along the last dimension."""


@pytest.mark.parametrize(("dtype", "shape"), CASES)
def test_a_tensor_of_any_dtype_and_shape_is_the_stored_bytes(store, dtype, shape):
    count = torch.Size(shape).numel()
    nbytes = count * DTYPE_BITS[dtype] // 8
    content = bytes([1] * nbytes)
    store.put(bytes(64) + content, [3])
    described = pb.AttachedTensor(name="t", dtype=dtype, shape=shape, offset=64, bytes=nbytes)
    found = tensor(store.attach(64 + nbytes, [3], tensors=[described]), "t")

    assert found.shape == (shape if dtype != "F4" else (*shape[:-1], shape[-1] // 2))
    raw = found.contiguous().flatten().view(torch.uint8) if nbytes else found.to(torch.float32).flatten()
    assert bytes(raw.tolist()) == content


def test_a_tensor_is_the_memory_itself(store):
    described = pb.AttachedTensor(name="t", dtype="F32", shape=[4], offset=64, bytes=16)
    attachment = store.attach(100, [0], tensors=[described])
    found = tensor(attachment, "t")
    store.put(bytes(64) + struct.pack("<4f", 1, 2, 3, 4), [0])

    assert found.data_ptr() == attachment.address(0) + 64
    assert found.tolist() == [1, 2, 3, 4]


def test_an_in_place_write_to_a_tensor_stays_in_this_process(store):
    described = pb.AttachedTensor(name="t", dtype="F32", shape=[4], offset=0, bytes=16)
    tensor(store.attach(100, [0], tensors=[described]), "t").fill_(1.0)

    assert os.pread(store.arena, 16, 0) == bytes(16)


def test_a_misaligned_tensor_is_copied_when_it_is_there(store):
    store.put(b"..." + struct.pack("<2f", 1.5, 2.5), [0])
    store.script = iter([lambda: store.ready(11)])
    described = pb.AttachedTensor(name="t", dtype="F32", shape=[2], offset=3, bytes=8)

    assert tensor(store.attach(11, [0], tensors=[described]), "t").tolist() == [1.5, 2.5]


def test_tied_names_share_one_tensor(store):
    described = pb.AttachedTensor(name="embed", dtype="F32", shape=[2], offset=0, bytes=8)
    found = tensors(store.attach(8, [0], tensors=[described], tied=[["embed", "head"]]))

    assert found["head"] is found["embed"]


def test_a_dtype_that_torch_lacks_is_refused_by_name(store):
    described = pb.AttachedTensor(name="t", dtype="F6_E2M3", shape=[4], offset=0, bytes=3)

    with pytest.raises(CheckpointInvalid, match="F6_E2M3, which torch"):
        tensor(store.attach(8, [0], tensors=[described]), "t")


def test_no_store_is_an_error_that_says_where(tmp_path):
    from stoker.attach import attach

    with pytest.raises(PeerError, match=r"no checkpoint store answers at .*nothing\.sock"):
        attach(tmp_path / "nothing.sock", "/models/a", holder="test")
