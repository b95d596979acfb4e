from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import stoker
from stoker.attach.memory import MappedRange
from stoker.checkpoint.convert import convert
from stoker.errors import CheckpointInvalid, InvalidRequest, LoadFailed, NotFound, PeerError
from stoker.loader import file_memory
from tests.unit.loader.tiny_models import CONFIGS, logits, tiny_model

DTYPES = (
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int8",
    "bool",
)


@pytest.fixture(params=["in_place", "converted"])
def layout(request) -> str:
    return request.param


def saved(model, folder: Path, layout: str, **options) -> Path:
    model.save_pretrained(folder / "hf", **options)
    if layout == "in_place":
        return folder / "hf"
    convert(folder / "hf", folder / "converted")
    return folder / "converted"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_model_is_the_one_that_transformers_loads(tmp_path, name, layout) -> None:
    folder = saved(tiny_model(name), tmp_path, layout)
    wanted = AutoModelForCausalLM.from_pretrained(folder)

    model = stoker.load_model(folder, daemon=None)

    assert type(model) is type(wanted)
    assert torch.equal(logits(model), logits(wanted))
    assert model.config.to_dict() == wanted.config.to_dict()
    assert model.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert not model.training
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in wanted.named_parameters()
    }


@pytest.mark.parametrize("name", ["llama_tied", "gemma2"])
def test_tied_weights_are_one_tensor(tmp_path, name, layout) -> None:
    model = stoker.load_model(saved(tiny_model(name), tmp_path, layout), daemon=None)

    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_shards_are_one_checkpoint(tmp_path) -> None:
    original = tiny_model("llama")
    folder = saved(original, tmp_path, "in_place", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1

    assert torch.equal(logits(stoker.load_model(folder, daemon=None)), logits(original))


def test_the_stored_dtype_stays_unless_another_is_asked_for(tmp_path) -> None:
    folder = saved(tiny_model("llama", torch.bfloat16), tmp_path, "in_place")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))

    found = [stoker.load_model(folder, daemon=None, dtype=dtype).dtype for dtype in (None, "auto", "float32")]

    assert found == [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("can_map", [True, False])
def test_tensors_of_every_dtype_come_back_bit_by_bit(tmp_path, monkeypatch, layout, can_map) -> None:
    bits = torch.randint(0, 2, (999, 8), dtype=torch.uint8)
    wanted = {
        f"model.{dtype}": bits.bool()
        if dtype == "bool"
        else bits.clone().reshape(-1).view(getattr(torch, dtype))
        for dtype in DTYPES
    }
    wanted |= {"model.scalar": torch.tensor(3.0), "model.empty": torch.empty(0, 4)}
    (tmp_path / "hf").mkdir()
    save_file(wanted, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text("{}")
    folder = tmp_path / "hf"
    if layout == "converted":
        folder = convert(folder, tmp_path / "converted").path
    if not can_map:
        monkeypatch.setattr(MappedRange, "fault_in", lambda *_, **__: False)

    found = stoker.load_tensors(folder, daemon=None)

    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path) -> None:
    folder = saved(tiny_model("llama"), tmp_path, "in_place")
    before = (folder / "model.safetensors").read_bytes()

    stoker.load_tensors(folder, daemon=None)["model.norm.weight"].zero_()

    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("can_map", [True, False])
def test_tensors_outlive_whatever_they_came_from(tmp_path, monkeypatch, can_map) -> None:
    folder = saved(tiny_model("llama"), tmp_path, "in_place")
    wanted = stoker.load_tensors(folder, daemon=None)["model.norm.weight"].clone()
    if not can_map:
        monkeypatch.setattr(MappedRange, "fault_in", lambda *_, **__: False)
    found = stoker.load_tensors(folder, daemon=None)["model.norm.weight"]

    (folder / "model.safetensors").unlink()

    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), CheckpointInvalid, "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), CheckpointInvalid, "neither"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99), CheckpointInvalid, "header"),
        (lambda folder: (folder / "config.json").write_text("[]"), CheckpointInvalid, "object"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "own", "auto_map": {}}'),
            CheckpointInvalid,
            "code of its own",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"model_type": "llama", "architectures": ["Nothing"]}'
            ),
            CheckpointInvalid,
            "Nothing",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(tmp_path, spoil, error, says) -> None:
    folder = saved(tiny_model("llama"), tmp_path, "in_place")
    spoil(folder)

    with pytest.raises(error, match=says):
        stoker.load_model(folder, daemon=None)


def test_quantised_models_are_refused_and_their_tensors_are_not(tmp_path) -> None:
    folder = saved(tiny_model("llama"), tmp_path, "in_place")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "fp8"}})
    )

    with pytest.raises(CheckpointInvalid, match="quantised"):
        stoker.load_model(folder, daemon=None)
    assert stoker.load_tensors(folder, daemon=None)


def test_a_file_that_is_not_cached_is_brought_in_piece_by_piece(tmp_path, monkeypatch) -> None:
    folder = saved(tiny_model("llama"), tmp_path, "in_place")
    wanted = stoker.load_tensors(folder, daemon=None)
    monkeypatch.setattr(file_memory, "is_cached", lambda _file: False)
    monkeypatch.setattr(file_memory, "POPULATE_BYTES", 4096)

    found = stoker.load_tensors(folder, daemon=None)

    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_file_that_changes_while_it_is_loaded_is_refused(tmp_path, monkeypatch) -> None:
    folder = saved(tiny_model("llama"), tmp_path, "in_place")

    def change(_file) -> bool:
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")
        return True

    monkeypatch.setattr(file_memory, "is_cached", change)

    with pytest.raises(LoadFailed, match="was changed"):
        stoker.load_tensors(folder, daemon=None)


def test_a_file_that_is_cut_between_header_and_bytes_is_refused(tmp_path, monkeypatch) -> None:
    folder = saved(tiny_model("llama"), tmp_path, "in_place")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    def cut(_file) -> bool:
        weights.write_bytes(whole[:-1])
        return False

    monkeypatch.setattr(file_memory, "is_cached", cut)

    with pytest.raises((CheckpointInvalid, LoadFailed), match="bytes"):
        stoker.load_tensors(folder, daemon=None)


def test_a_folder_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        stoker.load_tensors(tmp_path / "nowhere", daemon=None)


@pytest.mark.parametrize("device", ["cuda:99", "toaster", "meta"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path, device) -> None:
    with pytest.raises(InvalidRequest, match="device"):
        stoker.load_tensors(tmp_path / "nowhere", device=device, daemon=None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"attn_implementation": "nope"}, "'nope' is none of transformers' .*eager.*sdpa"),
        ({"tp_size": 0}, "tp_size is 0; give 1"),
        ({"tp_size": 2}, "start them with torchrun"),
    ],
)
def test_a_wrong_argument_is_the_caller_s_fault_and_not_the_checkpoint_s(tmp_path, arguments, says) -> None:
    folder = saved(tiny_model("llama"), tmp_path, "in_place")
    with pytest.raises(InvalidRequest, match=says):
        stoker.load_model(folder, daemon=None, **arguments)


def test_a_name_that_may_be_the_hub_s_is_told_how_to_write_it(tmp_path) -> None:
    with pytest.raises(NotFound, match="for the hub's model of that name, hf://nobody/nothing"):
        stoker.load_tensors("nobody/nothing", daemon=None)
    with pytest.raises(NotFound) as absolute:
        stoker.load_tensors(tmp_path / "none", daemon=None)
    assert "hf://" not in absolute.value.message
    assert absolute.value.message.count(str(tmp_path)) == 1


def test_a_dtype_that_no_model_computes_in_is_refused(tmp_path) -> None:
    folder = saved(tiny_model("llama"), tmp_path, "in_place")

    with pytest.raises(InvalidRequest, match="int8"):
        stoker.load_model(folder, dtype="int8", daemon=None)


def test_a_remote_uri_needs_a_daemon(monkeypatch) -> None:
    with pytest.raises(PeerError, match="store daemon"):
        stoker.load_tensors("s3://bucket/model", daemon=None)
    monkeypatch.setenv("STOKER_ATTACH_SOCKET", "")
    with pytest.raises(PeerError, match="store daemon"):
        stoker.load_tensors("s3://bucket/model")


def test_a_daemon_that_was_named_and_is_not_there_is_an_error(tmp_path) -> None:
    folder = saved(tiny_model("llama"), tmp_path, "in_place")

    with pytest.raises(PeerError, match="No store daemon"):
        stoker.load_tensors(folder, daemon=tmp_path / "attach.sock")


def test_import_stoker_imports_nothing_heavy(run_python) -> None:
    out = run_python(
        "import sys, stoker; print([m for m in ('torch', 'transformers', 'grpc') if m in sys.modules])"
    )

    assert out == "[]"


def damaged(folder: Path) -> Path:
    """Return a converted checkpoint with one bit of a tensor flipped, as the page cache has it."""
    source = saved(tiny_model("llama"), folder, "converted")
    (file,) = source.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    return source


def test_bytes_from_the_disk_are_compared_with_their_digests(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(file_memory, "is_cached", lambda _file: False)
    folder = damaged(tmp_path)

    for load in (stoker.load_model, stoker.load_tensors):
        with pytest.raises(CheckpointInvalid, match=r"is damaged between bytes 0 and .*convert the original"):
            load(folder, daemon=None)

    assert stoker.load_tensors(folder, daemon=None, verify="never")


def test_what_the_page_cache_has_is_compared_when_asked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(file_memory, "is_cached", lambda _file: True)
    folder = damaged(tmp_path)

    assert stoker.load_tensors(folder, daemon=None)
    with pytest.raises(CheckpointInvalid, match="is damaged"):
        stoker.load_tensors(folder, daemon=None, verify="always")


def test_memory_that_was_read_into_is_compared_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(MappedRange, "fault_in", lambda *_args, **_options: False)
    monkeypatch.setattr(file_memory, "is_cached", lambda _file: False)

    with pytest.raises(CheckpointInvalid, match="is damaged"):
        stoker.load_tensors(damaged(tmp_path), daemon=None)


def test_an_unknown_verify_names_those_there_are(tmp_path) -> None:
    with pytest.raises(InvalidRequest, match="verify='yes': choose one of 'always', 'first', 'never'"):
        stoker.load_tensors(tmp_path, daemon=None, verify="yes")
