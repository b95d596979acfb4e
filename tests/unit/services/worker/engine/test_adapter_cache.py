"""Adapters in a worker's memory: what is kept, what makes room, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest
import torch
from safetensors.torch import save_file

from services.worker.engine.adapter_cache import AdapterCache
from stoker.attach.attachment import Attachment
from stoker.attach.columns import Tensor
from stoker.checkpoint.adapter import adapter_index, open_adapter
from stoker.errors import CapacityError, CheckpointInvalid, DoesNotFit, InvalidRequest, NotFound, PeerError
from stoker.v1.model_pb2 import AdapterSpec, CheckpointInfo

RANK = 2
ADAPTER_BYTES = RANK * (64 + 64) * 4


def lora(folder: Path, *, module: str = "model.layers.0.self_attn.q_proj", out: int = 64) -> AdapterSpec:
    """Write an adapter of one module of the tiny llama."""
    folder.mkdir()
    prefix = f"base_model.model.{module}"
    tensors = {
        f"{prefix}.lora_A.weight": torch.ones(RANK, 64),
        f"{prefix}.lora_B.weight": torch.ones(out, RANK),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return AdapterSpec(name=folder.name, uri=str(folder), revision=open_adapter(folder).revision)


def no_store(wanted: AdapterSpec) -> Attachment:
    raise AssertionError(f"{wanted.name} lies on this host")


class Attached:
    """What the worker sees of an attached adapter: the folder's bytes; says when it is given up."""

    def __init__(self, folder: Path, revision: str) -> None:
        index = adapter_index(folder)
        self.data = index.files[0].path.read_bytes()
        self.checkpoint = CheckpointInfo(uri="http://origin/a", revision=revision)
        self.small_files = {"adapter_config.json": (folder / "adapter_config.json").read_bytes()}
        self.tensors = {
            each.name: Tensor(
                name=each.name,
                dtype=each.dtype,
                shape=each.shape,
                file=0,
                offset=each.offset,
                nbytes=each.nbytes,
                layer=each.layer,
            )
            for each in index.tensors
        }
        self.tied = ()
        self.waits = self.closed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed += 1

    def buffer(self, _file: int, offset: int = 0, length: int | None = None) -> memoryview:
        """See `Attachment`."""
        return memoryview(bytearray(self.data))[offset : None if length is None else offset + length]

    def wait_tensor(self, _name: str) -> None:
        """See `Attachment`."""
        self.wait_all()

    def wait_all(self) -> None:
        """See `Attachment`."""
        self.waits += 1


@pytest.fixture
def cache_of(models):
    made: list[AdapterCache] = []

    def make(*, max_count: int = 8, max_bytes: int = 1 << 20, attach: Callable = no_store) -> AdapterCache:
        made.append(AdapterCache(models("llama"), max_count=max_count, max_bytes=max_bytes, attach=attach))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def test_an_adapter_is_read_once_and_fitted_to_the_model(cache_of, tmp_path) -> None:
    cache, wanted = cache_of(), lora(tmp_path / "a")

    first = cache.lease(wanted).result(10)
    again = cache.lease(wanted)

    assert again.done()
    assert again.result() is first
    assert first.name == "a"
    assert first.modules["model.layers.0.self_attn.q_proj"].a_RI.shape == (RANK, 64)


@pytest.mark.parametrize("bound", [{"max_count": 2}, {"max_bytes": 2 * ADAPTER_BYTES}])
def test_the_longest_unused_adapter_makes_room(cache_of, tmp_path, bound) -> None:
    cache = cache_of(**bound)
    a, b, c = (lora(tmp_path / name) for name in "abc")
    for wanted in (a, b):
        cache.lease(wanted).result(10)
        cache.release(wanted)
    cache.lease(a).result(10)
    cache.release(a)

    cache.lease(c).result(10)

    assert cache.names() == ["a", "c"]


def test_an_adapter_that_a_session_holds_stays_and_another_is_asked_to_wait(cache_of, tmp_path) -> None:
    cache = cache_of(max_count=1)
    a, b = lora(tmp_path / "a"), lora(tmp_path / "b")
    cache.lease(a).result(10)

    with pytest.raises(CapacityError, match="adapter b has no room") as refusal:
        cache.lease(b).result(10)
    cache.release(a)

    assert refusal.value.retry_after_seconds
    assert cache.lease(b).result(10).name == "b"
    assert cache.names() == ["b"]


def test_an_adapter_larger_than_the_bound_does_not_fit(cache_of, tmp_path) -> None:
    with pytest.raises(DoesNotFit, match="STOKER_WORKER_MAX_ADAPTER_BYTES"):
        cache_of(max_bytes=100).lease(lora(tmp_path / "a")).result(10)


def test_an_adapter_in_memory_stays_what_it_was_whatever_becomes_of_its_file(cache_of, tmp_path) -> None:
    cache, wanted = cache_of(), lora(tmp_path / "a")
    weights = cache.lease(wanted).result(10).modules["model.layers.0.self_attn.q_proj"].a_RI
    before = weights.clone()
    with (tmp_path / "a" / "adapter_model.safetensors").open("r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(bytes(len(content)))
        file.truncate(64)

    assert torch.equal(weights, before)


def test_an_adapter_that_was_changed_since_it_was_deployed_is_refused(cache_of, tmp_path) -> None:
    wanted = lora(tmp_path / "a")
    wanted.revision = "0" * 32

    with pytest.raises(CheckpointInvalid, match="changed since it was deployed"):
        cache_of().lease(wanted).result(10)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"out": 32}, "64 → 64, not 64 → 32"),
        ({"module": "model.layers.0.self_attn.x_proj"}, "no such module"),
        ({"module": "lm_head", "out": 512}, "output head"),
        ({"module": "model.layers.0.mlp.experts.1.up_proj"}, "single experts"),
    ],
)
def test_an_adapter_for_another_model_is_refused(cache_of, tmp_path, change, reason) -> None:
    with pytest.raises(CheckpointInvalid, match=reason):
        cache_of().lease(lora(tmp_path / "a", **change)).result(10)


def test_a_failed_adapter_is_tried_again(cache_of, tmp_path) -> None:
    cache = cache_of()
    with pytest.raises(NotFound):
        cache.lease(AdapterSpec(name="a", uri=str(tmp_path / "a"))).result(10)
    lora(tmp_path / "a")

    assert cache.lease(AdapterSpec(name="a", uri=str(tmp_path / "a"))).result(10).name == "a"


def test_a_far_adapter_comes_from_the_store_whose_lease_ends(cache_of, tmp_path) -> None:
    near = lora(tmp_path / "a")
    attached = Attached(tmp_path / "a", near.revision)
    wanted = AdapterSpec(name="a", uri="http://origin/a", revision=near.revision, far=True)
    asked: list[AdapterSpec] = []

    def attach(spec: AdapterSpec) -> Attached:
        asked.append(spec)
        return attached

    cache = cache_of(attach=attach)
    far, again = cache.lease(wanted), cache.lease(wanted)

    here = cache_of().lease(near).result(10).modules["model.layers.0.self_attn.q_proj"]
    there = far.result(10).modules["model.layers.0.self_attn.q_proj"]
    assert torch.equal(there.a_RI, here.a_RI)
    assert torch.equal(there.b_OR, here.b_OR)
    assert again.result(10) is far.result()
    assert far.result().identity == (wanted.uri, wanted.revision)
    assert (asked, attached.closed) == ([wanted], 1)


def test_a_far_adapter_that_does_not_fit_is_refused_before_its_bytes_are_waited_for(
    cache_of, tmp_path
) -> None:
    attached = Attached(tmp_path / "a", lora(tmp_path / "a").revision)
    cache = cache_of(max_bytes=100, attach=lambda _: attached)

    with pytest.raises(DoesNotFit):
        cache.lease(AdapterSpec(name="a", uri="http://origin/a", far=True)).result(10)

    assert (attached.waits, attached.closed) == (0, 1)


def test_what_the_store_says_of_a_far_adapter_reaches_the_session(cache_of) -> None:
    def attach(_: AdapterSpec) -> Attached:
        raise PeerError("no checkpoint store answers")

    with pytest.raises(PeerError, match="no checkpoint store"):
        cache_of(attach=attach).lease(AdapterSpec(name="a", uri="http://origin/a", far=True)).result(10)


def test_a_whole_model_is_no_far_adapter(cache_of, tmp_path) -> None:
    attached = Attached(tmp_path / "a", lora(tmp_path / "a").revision)
    attached.small_files = {"config.json": b"{}"}

    with pytest.raises(CheckpointInvalid, match="holds no adapter"):
        cache_of(attach=lambda _: attached).lease(AdapterSpec(name="a", uri="x", far=True)).result(10)


def test_an_adapter_elsewhere_that_no_store_spoke_of_is_refused(cache_of) -> None:
    with pytest.raises(InvalidRequest, match="no folder of this host"):
        cache_of().lease(AdapterSpec(name="a", uri="s3://bucket/a")).result(10)
