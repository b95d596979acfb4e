"""Descriptions of models: defaults filled in, nonsense refused with the field at fault."""

from __future__ import annotations

from typing import Any

import pytest

from services.controller.settings import ControllerSettings
from services.controller.specs import check_architecture, on_devices, resolve
from stoker.errors import CheckpointInvalid, InvalidRequest
from stoker.v1 import model_pb2

SETTINGS = ControllerSettings(state="embedded://:memory:", keep_alive_seconds=11, max_replicas=2)


def a_spec(**fields: Any) -> model_pb2.ModelSpec:
    return model_pb2.ModelSpec(**({"name": "m", "checkpoint_uri": "/models/m"} | fields))


def test_unset_numbers_get_the_controllers_defaults() -> None:
    full = resolve(a_spec(), SETTINGS)

    assert (full.keep_alive_seconds, full.max_replicas, full.concurrency, full.max_queue) == (11, 2, 8, 128)
    assert (full.engine, full.dtype) == ("transformers", "auto")


def test_a_keep_alive_of_zero_is_not_unset() -> None:
    assert resolve(a_spec(keep_alive_seconds=0), SETTINGS).keep_alive_seconds == 0


def test_the_default_maximum_makes_room_for_the_minimum() -> None:
    assert resolve(a_spec(min_replicas=5), SETTINGS).max_replicas == 5


@pytest.mark.parametrize("name", ["m", "SmolLM2-135M", "org/model.v1_2", "9"])
def test_ordinary_names_are_accepted(name: str) -> None:
    assert resolve(a_spec(name=name), SETTINGS).name == name


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("name", {"name": ""}),
        ("name", {"name": "/m"}),
        ("name", {"name": "m m"}),
        ("name", {"name": "m\n"}),
        ("name", {"name": "m" * 129}),
        ("checkpoint_uri", {"checkpoint_uri": ""}),
        ("keep_alive_seconds", {"keep_alive_seconds": float("nan")}),
        ("keep_alive_seconds", {"keep_alive_seconds": 1e12}),
        ("min_replicas", {"min_replicas": 3, "max_replicas": 2}),
        ("max_replicas", {"max_replicas": 100_000}),
        ("concurrency", {"concurrency": 100_000}),
        ("max_queue", {"max_queue": 10_000_000}),
        ("engine", {"engine": "vroom"}),
        ("dtype", {"dtype": "float13"}),
        ("labels", {"labels": {str(key): "" for key in range(33)}}),
        ("labels", {"labels": {"a key": ""}}),
        ("required_node_labels", {"required_node_labels": {"": "a100"}}),
        ("required_node_labels", {"required_node_labels": {"gpu": "x" * 257}}),
        ("preferred_node_labels", {"preferred_node_labels": {str(key): "" for key in range(33)}}),
        ("max_context_tokens", {"max_context_tokens": 1_000_000_000}),
        ("kv_cache_bytes", {"kv_cache_bytes": 1 << 50}),
        ("keep_alive_seconds", {"keep_alive_auto": True, "keep_alive_seconds": 0}),
    ],
)
def test_a_field_out_of_range_is_refused_and_named(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve(a_spec(**fields), SETTINGS)

    assert refused.value.param == field


@pytest.mark.parametrize("asked", [0, 2])
def test_a_replica_takes_a_device_for_each_rank_of_its_checkpoint(asked: int) -> None:
    cut = model_pb2.CheckpointInfo(uri="/m", tensor_parallel=2)

    assert on_devices(a_spec(devices=asked), cut).devices == 2
    assert on_devices(a_spec(), model_pb2.CheckpointInfo(uri="/m")).devices == 1


@pytest.mark.parametrize(
    ("ranks", "why"),
    [(0, "in one piece.*convert --tensor-parallel 4 SRC DST"), (2, "cut for 2 ranks.*leave devices out")],
)
def test_devices_that_a_checkpoint_is_not_cut_for_are_refused_with_what_to_do(ranks: int, why: str) -> None:
    checkpoint = model_pb2.CheckpointInfo(uri="/m", tensor_parallel=ranks)

    with pytest.raises(InvalidRequest, match=why) as refused:
        on_devices(a_spec(devices=4), checkpoint)
    assert refused.value.param == "devices"


def test_adapters_of_a_checkpoint_that_is_cut_are_refused() -> None:
    spec = a_spec()
    spec.adapters.add(name="poet", uri="/a")

    with pytest.raises(InvalidRequest, match="adapters are not added to tensor-parallel ranks"):
        on_devices(spec, model_pb2.CheckpointInfo(uri="/m", tensor_parallel=2))


def test_what_placement_heeds_is_kept_as_given() -> None:
    fields = {"pinned": True, "required_node_labels": {"gpu": "a100"}, "preferred_node_labels": {"zone": "b"}}

    full = resolve(a_spec(**fields), SETTINGS)

    assert (full.pinned, dict(full.required_node_labels)) == (True, {"gpu": "a100"})


def test_an_architecture_nobody_serves_is_refused_with_near_ones() -> None:
    checkpoint = model_pb2.CheckpointInfo(uri="/m", architecture="LlamaForCasualLM")

    with pytest.raises(CheckpointInvalid, match="near ones that are: LlamaForCausalLM"):
        check_architecture(checkpoint, {"LlamaForCausalLM", "GPT2LMHeadModel"})


def test_any_architecture_passes_while_no_node_has_said_what_it_serves() -> None:
    check_architecture(model_pb2.CheckpointInfo(architecture="X"), set())
