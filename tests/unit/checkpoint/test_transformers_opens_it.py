"""Claim: `AutoModelForCausalLM.from_pretrained` opens a converted checkpoint and every parameter is equal."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from stoker.checkpoint.convert import convert
from stoker.checkpoint.index import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 6,
}
CONFIGS = {
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-untied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=99, n_embd=24, n_layer=2, n_head=4, n_positions=32),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
}


def build(name: str, dtype: object) -> Any:
    torch.manual_seed(4)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)


def parameters(model: Any) -> dict[str, Any]:
    return dict(model.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["safetensors", "sharded", "pickle"])
def test_every_parameter_is_equal(tmp_path: Path, name: str, dtype: str, kind: str) -> None:
    model = build(name, getattr(torch, dtype))
    model.save_pretrained(tmp_path / "src", max_shard_size="20KB" if kind == "sharded" else "1GB")
    if kind == "pickle":
        (tmp_path / "src" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "src" / "pytorch_model.bin")

    convert(tmp_path / "src", tmp_path / "dst")
    opened, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dst", output_loading_info=True
    )

    expected, found = parameters(model), parameters(opened)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert opened.dtype == getattr(torch, dtype)
    assert not info["missing_keys"]
    assert all(key.startswith("__stoker_pad__.") for key in info["unexpected_keys"])


def test_a_model_whose_tensors_fill_the_boundary_is_opened_without_a_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sizes of real models are multiples of 256 bytes; then there is no filler to be reported."""
    sizes = {**SIZES, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "src")

    convert(tmp_path / "src", tmp_path / "dst")
    with caplog.at_level(logging.WARNING):
        _, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dst", output_loading_info=True
        )

    assert not info["unexpected_keys"]
    assert not caplog.records


def test_a_tie_that_the_config_does_not_mention_is_found_by_asking_the_architecture(tmp_path: Path) -> None:
    """Old GPT-2 configurations are silent; their pickles hold the head on the embedding's memory."""
    model = build("gpt2", torch.float32)
    model.config.save_pretrained(tmp_path / "src")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "src" / "pytorch_model.bin")

    index = convert(tmp_path / "src", tmp_path / "dst")

    assert index.tied_groups == (("transformer.wte.weight", "lm_head.weight"),)


def test_a_cast_checkpoint_opens_in_its_new_dtype(tmp_path: Path) -> None:
    model = build("llama-untied", torch.float32)
    model.save_pretrained(tmp_path / "src")

    convert(tmp_path / "src", tmp_path / "dst", dtype="bfloat16")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst")

    expected = parameters(model.to(torch.bfloat16))
    assert opened.dtype == torch.bfloat16
    assert all(torch.equal(value, expected[key]) for key, value in parameters(opened).items())


def test_facts_are_read_from_every_architectures_config(tmp_path: Path) -> None:
    for name in CONFIGS:
        build(name, torch.float32).save_pretrained(tmp_path / name)
        facts = open_checkpoint(tmp_path / name).facts

        assert facts.architecture is not None
        assert facts.context_length in {32, 64}
        assert facts.vocab_size == 99
