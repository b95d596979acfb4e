"""Loading a model whose bytes arrive when the test says so: the store's messages are scripted."""

from __future__ import annotations

import json
import mmap
import os
import queue
import struct
import threading

import pytest
import torch

from services.worker import load
from services.worker.engine.engine_thread import EngineThread
from services.worker.engine.protocol import EngineLimits
from services.worker.engine.transformers_engine import TransformersEngine
from services.worker.kv.kv_budget import kv_bytes_per_token
from services.worker.kv.kv_store import SLOT_TOKENS
from services.worker.load import LoadedModel, completed, load_model
from services.worker.settings import WorkerSettings
from services.worker.weights.device_weights import DeviceWeights
from stoker.attach import Attachment
from stoker.checkpoint.execution_order import execution_order
from stoker.errors import DeadlineExceeded, LoadFailed, StokerError
from stoker.units import align_up
from stoker.v1 import checkpoint_store_pb2 as pb
from stoker.v1.model_pb2 import ModelSpec
from stoker.v1.start_pb2 import TierTransfer
from stoker.v1.worker_pb2 import LoadModelRequest
from tests.copy_engines.fake import FakeCopyEngine
from tests.unit.services.worker.engine.test_engine_thread import PATIENCE_SECONDS, Collector
from tests.unit.services.worker.tiny_models import config_json, reference, request, run, served

CHUNK = mmap.PAGESIZE
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class ScriptedStore:
    """One checkpoint in one file; chunks become ready, and the load ends, when the test says so."""

    def __init__(self, model) -> None:
        stored = {
            key: value for key, value in model.state_dict().items() if key not in model.all_tied_weights_keys
        }
        self._events: queue.Queue[pb.AttachProgress] = queue.Queue()
        self._content = bytearray()
        described = []
        for placed in execution_order(stored):
            value = stored[placed.name]
            at = align_up(len(self._content), 256)
            raw = value.contiguous().view(torch.uint8).numpy().tobytes()
            self._content += bytes(at - len(self._content)) + raw
            described.append(
                pb.AttachedTensor(
                    name=placed.name, dtype=DTYPES[value.dtype], shape=value.shape, offset=at, bytes=len(raw),
                    layer=placed.layer,
                )
            )  # fmt: skip
        chunks = -(-len(self._content) // CHUNK)
        self._arena = os.memfd_create("arena")
        os.ftruncate(self._arena, chunks * CHUNK)
        os.pwrite(self._arena, b"\xff" * chunks * CHUNK, 0)  # NaN until it is ready
        self._counters = os.memfd_create("counters")
        os.ftruncate(self._counters, mmap.PAGESIZE)
        self._attached = pb.Attached(
            arena_bytes=chunks * CHUNK,
            chunk_bytes=CHUNK,
            files=[
                pb.AttachedFile(
                    name="f", bytes=len(self._content), chunk_offsets=[k * CHUNK for k in range(chunks)]
                )
            ],
            tensors=described,
            small_files=[pb.SmallFile(name="config.json", content=json.dumps(config_json(model)).encode())],
        )
        self._ready = 0

    @property
    def byte_count(self) -> int:
        """Return the file's size."""
        return len(self._content)

    def attach(self, *_arguments: object, **_named: object) -> Attachment:
        """Be `stoker.attach.attach`."""
        return Attachment(
            self,  # type: ignore[arg-type]
            self._attached,
            (self._arena, self._counters),
            connect_seconds=0.0,
            reply_seconds=0.0,
        )

    def next_event(self, *, timeout_seconds: float | None) -> pb.AttachProgress:
        """Be the connection."""
        try:
            return self._events.get(timeout=timeout_seconds or PATIENCE_SECONDS)
        except queue.Empty:
            raise DeadlineExceeded("nothing came") from None

    def bring(self, fraction: float) -> None:
        """Let the file arrive up to here."""
        end = int(len(self._content) * fraction)
        os.pwrite(self._arena, self._content[self._ready : end], self._ready)
        self._ready = end
        os.pwrite(self._counters, struct.pack("<Q", end), 0)
        self._events.put(pb.AttachProgress(file_ready=pb.FileReady(file=0, bytes=end)))

    def finish(self) -> None:
        """Let the rest arrive."""
        self.bring(1.0)
        moved = TierTransfer(tier="disk", bytes=len(self._content), seconds=1.0)
        self._events.put(pb.AttachProgress(done=pb.AttachDone(transfers=[moved], seconds=1.5)))

    def break_down(self) -> None:
        """Fail the load."""
        failed = pb.AttachFailed(code="load_failed", message="disk broke")
        self._events.put(pb.AttachProgress(failed=failed))


@pytest.fixture
def loading(monkeypatch):
    """Load a tiny model from a scripted store; gives the store and the loaded model."""

    def begin(name: str = "llama", stored=torch.float32, dtype: str = "", **settings: object):
        store = ScriptedStore(reference(name, stored))
        monkeypatch.setattr(load, "attach", store.attach)
        asked = LoadModelRequest(spec=ModelSpec(name="m", dtype=dtype, max_context_tokens=64))
        chosen = WorkerSettings(socket="/s", worker_id="w", **settings)
        return store, lambda: load_model(asked, chosen)

    return begin


@pytest.mark.parametrize(("cache_tokens", "slots"), [(300, 0), (1200, 2), (100_000, 8)])
def test_a_default_cache_leaves_the_batch_its_pool(cache_tokens: int, slots: int) -> None:
    model, cpu = reference("llama"), torch.device("cpu")
    cache_bytes = cache_tokens * kv_bytes_per_token(model.config, torch.float32)
    settings = WorkerSettings(socket="/s", worker_id="w", default_kv_cache_bytes=cache_bytes)

    limits = load.limits_for(LoadModelRequest(spec=ModelSpec(name="m")), settings, model, cpu)

    assert limits.max_context_tokens == cache_tokens
    assert limits.max_kv_tokens - limits.max_context_tokens == slots * SLOT_TOKENS


@pytest.mark.parametrize(("deals_out_heads", "tokens"), [(True, 600), (False, 300)])
def test_ranks_that_each_keep_all_heads_hold_half_as_many_tokens(deals_out_heads, tokens) -> None:
    model, cpu = reference("llama"), torch.device("cpu")
    cache_bytes = 600 * kv_bytes_per_token(model.config, torch.float32)
    request = LoadModelRequest(spec=ModelSpec(name="m", kv_cache_bytes=cache_bytes))
    settings = WorkerSettings(socket="/s", worker_id="w")

    limits = load.limits_for(request, settings, model, cpu, ranks=2, deals_out_heads=deals_out_heads)

    assert limits.max_kv_tokens == tokens


def generated(model: LoadedModel, collector: Collector) -> EngineThread:
    """Submit a session."""
    thread = EngineThread(
        model.engine, on_outputs=collector.take, on_failure=collector.fail, interrupt=model.gate.interrupt
    )
    thread.start()
    thread.submit(request())
    return thread


def token_ids(collector: Collector) -> list[int]:
    return [out.token_id for call in collector.calls for out in call if hasattr(out, "token_id")]


def expected(name: str = "llama", dtype: torch.dtype = torch.float32, then: torch.dtype | None = None):
    model = reference(name, dtype)
    engine = TransformersEngine(served(model.to(then or dtype)), EngineLimits(max_context_tokens=64))
    return [out.token_id for out in run(engine, [request()])[0]["s"]]


@pytest.mark.parametrize(
    ("name", "stored", "dtype"),
    [
        ("llama", torch.float32, ""),
        ("llama_tied", torch.float32, ""),
        ("gpt2", torch.float32, ""),
        ("llama", torch.float32, "bfloat16"),
        ("llama_tied", torch.bfloat16, "float32"),
    ],
)
def test_sessions_are_taken_before_any_weight_is_there_and_answered_as_ever(
    loading, name, stored, dtype
) -> None:
    store, begin = loading(name, stored, dtype)
    model, collector = begin(), Collector()
    assert not model.loaded.done()
    thread = generated(model, collector)

    for step in range(1, 12):
        store.bring(step / 12)
    assert not collector.ended.is_set()
    store.finish()
    assert collector.ended.wait(PATIENCE_SECONDS)
    assert thread.close(PATIENCE_SECONDS)

    assert token_ids(collector) == expected(name, stored, getattr(torch, dtype) if dtype else None)
    assert model.gate.has_opened(model.needs_stages)


def test_the_timings_are_complete_once_all_weights_are_there(loading) -> None:
    store, begin = loading()
    model = begin()
    store.finish()

    timings = completed(model)

    assert timings.weights_seconds == 1.5
    assert [moved.tier for moved in timings.transfers] == ["disk"]
    assert timings.skeleton_seconds > 0
    assert (timings.overlap_seconds, timings.stall_seconds) == (0.0, 0.0)


def test_a_load_that_breaks_ends_the_passes_that_wait_with_its_reason(loading) -> None:
    store, begin = loading()
    model, collector = begin(), Collector()
    thread = generated(model, collector)
    store.bring(0.5)
    store.break_down()
    assert collector.ended.wait(PATIENCE_SECONDS)

    assert isinstance(collector.failure, LoadFailed)
    assert collector.failure is model.gate.error
    assert token_ids(collector) == []
    with pytest.raises(LoadFailed, match="disk broke"):
        completed(model)
    assert thread.close(PATIENCE_SECONDS)


def test_overlap_can_be_turned_off(loading) -> None:
    store, begin = loading(execute_while_loading=False)
    loaded: list[LoadedModel] = []
    thread = threading.Thread(target=lambda: loaded.append(begin()))
    thread.start()
    store.bring(0.5)
    assert loaded == []
    store.finish()
    thread.join(PATIENCE_SECONDS)

    assert loaded[0].loaded.done()


def test_a_load_that_broke_before_the_engine_was_there_is_refused(loading) -> None:
    store, begin = loading(execute_while_loading=False)
    store.break_down()

    with pytest.raises(StokerError, match="disk broke"):
        begin()


@pytest.mark.parametrize(
    ("name", "stored", "dtype"),
    [("llama", torch.float32, ""), ("llama_tied", torch.float32, ""), ("gpt2", torch.bfloat16, "float32")],
)
def test_on_a_device_a_pass_waits_for_copies_that_are_still_under_way(
    loading, monkeypatch, name, stored, dtype
) -> None:
    engines: list[FakeCopyEngine] = []

    def on_device(attachment, order, *, device, dtype, pool):
        engines.append(FakeCopyEngine())
        return DeviceWeights(attachment, order, engines[0], dtype=dtype)

    monkeypatch.setattr(load, "weights_for", on_device)
    store, begin = loading(name, stored, dtype)
    model, collector = begin(), Collector()
    thread = generated(model, collector)
    for step in range(1, 12):
        store.bring(step / 12)
    store.finish()
    assert collector.ended.wait(PATIENCE_SECONDS)
    assert thread.close(PATIENCE_SECONDS)

    assert token_ids(collector) == expected(name, stored, getattr(torch, dtype) if dtype else None)
    (_, device) = completed(model).transfers
    assert (device.tier, device.bytes) == ("device", store.byte_count)


def test_a_device_gives_the_pool_back_when_it_has_everything(loading, monkeypatch) -> None:
    monkeypatch.setattr(
        load,
        "weights_for",
        lambda a, o, *, device, dtype, pool: DeviceWeights(a, o, FakeCopyEngine(), dtype=dtype),
    )
    store, begin = loading()
    model = begin()
    store.finish()
    completed(model)

    assert model.weights._attachment is None
