from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stoker
from stoker.checkpoint.adapter import is_adapter, open_adapter
from stoker.errors import AlreadyExists, CheckpointInvalid, NotFound
from tests.unit.loader.tiny_models import logits, tiny_model

RANK = 4


def lora(folder: Path, *, seed: int = 0, targets=("q_proj", "down_proj"), **config) -> Path:
    """An adapter for the tiny llama, as PEFT writes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in tiny_model("llama").named_modules():
        if name.rpartition(".")[2] in targets:
            out, inner = module.weight.shape
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 6,
        "bias": "none",
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return folder


def merged(folder: Path, scale: float):
    """The oracle: a base whose weights have the change added, W + scale · B A."""
    model = tiny_model("llama")
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, a in tensors.items():
            if ".lora_A." in name:
                module = model.get_submodule(
                    name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                )
                module.weight += scale * tensors[name.replace("lora_A", "lora_B")] @ a
    return model


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 6 / RANK),
        ({"use_rslora": True}, 6 / math.sqrt(RANK)),
        ({"alpha_pattern": {"q_proj": 6}}, 6 / RANK),
    ],
)
def test_an_adapter_adds_what_merging_would(tmp_path, config, scale) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = logits(model)

    adapters = stoker.load_adapter(model, lora(tmp_path / "a", **config), "a")

    torch.testing.assert_close(logits(model), logits(merged(tmp_path / "a", scale)), rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(model), base)
    adapters.activate(None)
    assert torch.equal(logits(model), base)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_several_adapters_share_one_base(tmp_path) -> None:
    model = tiny_model("llama")
    base = logits(model)
    adapters = stoker.load_adapter(model, lora(tmp_path / "a"), "a")
    with_a = logits(model)
    stoker.load_adapter(model, lora(tmp_path / "b", seed=1, targets=("v_proj",)), "b")
    with_b = logits(model)

    assert adapters.names == ("a", "b")
    assert adapters.active == "b"
    with adapters.using("a"):
        assert torch.equal(logits(model), with_a)
        with adapters.using(None):
            assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), with_b)
    adapters.remove("b")
    assert torch.equal(logits(model), base)
    with pytest.raises(NotFound, match="no adapter 'b'"):
        adapters.activate("b")
    with pytest.raises(AlreadyExists):
        stoker.load_adapter(model, tmp_path / "a", "a")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what PEFT asks it
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, as it sees that the base was never on the hub
def test_peft_gets_the_same_result(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("gpt2")
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True)
    wrapped = peft.get_peft_model(tiny_model("gpt2"), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(tmp_path / "peft")

    stoker.load_adapter(model, tmp_path / "peft")

    torch.testing.assert_close(logits(model), logits(wrapped.eval()), rtol=1e-5, atol=1e-5)


def test_an_adapter_takes_the_bases_dtype(tmp_path) -> None:
    model = tiny_model("llama", torch.bfloat16)

    weights = stoker.load_adapter(model, lora(tmp_path / "a"), "a").weights("a")

    assert {each.a_RI.dtype for each in weights.values()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_what_an_adapter_is_can_be_told_without_its_base(tmp_path) -> None:
    adapter = open_adapter(lora(tmp_path / "a", rank_pattern={"k_proj": 9}))

    assert is_adapter(tmp_path / "a")
    assert adapter.base_model == "tiny"
    assert adapter.target_names == ("down_proj", "q_proj")
    assert {pair.rank for pair in adapter.pairs.values()} == {RANK}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 8}, "rank 8"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"rank_pattern": {"^.*q_proj$": 2}}, "expression"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, config, says) -> None:
    with pytest.raises(CheckpointInvalid, match=says):
        open_adapter(lora(tmp_path / "a", **config))


def test_tensors_that_are_no_pairs_are_refused(tmp_path) -> None:
    folder = lora(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    one = next(iter(tensors))
    save_file({name: t for name, t in tensors.items() if name != one}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointInvalid, match="only one of"):
        open_adapter(folder)
    save_file({**tensors, "lm_head.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointInvalid, match=r"lm_head\.weight"):
        open_adapter(folder)


@pytest.mark.parametrize(("name", "says"), [("gpt2", "no such module"), ("llama", "not 64")])
def test_an_adapter_for_another_model_is_refused(tmp_path, name, says) -> None:
    other = tiny_model(name) if name == "gpt2" else tiny_model(name, hidden_size=32)

    with pytest.raises(CheckpointInvalid, match=says):
        stoker.load_adapter(other, lora(tmp_path / "a"))
