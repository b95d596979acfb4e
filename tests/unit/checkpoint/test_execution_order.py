"""Claims about the order in which a model uses its tensors."""

from __future__ import annotations

import random

import pytest

from stoker.checkpoint.execution_order import execution_order, is_input_embedding, is_output_head

LLAMA = [
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.experts.2.up_proj.weight",
    "model.layers.0.mlp.experts.10.up_proj.weight",
    "model.layers.2.self_attn.q_proj.weight",
    "model.layers.10.self_attn.q_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]
GPT2 = [
    "transformer.wpe.weight",
    "transformer.wte.weight",
    "transformer.h.0.ln_1.weight",
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.0.ln_2.weight",
    "transformer.h.0.mlp.c_fc.weight",
    "transformer.h.11.ln_1.weight",
    "transformer.ln_f.weight",
    "lm_head.weight",
]
NEOX = [
    "gpt_neox.embed_in.weight",
    "gpt_neox.layers.0.input_layernorm.weight",
    "gpt_neox.layers.0.attention.dense.weight",
    "gpt_neox.layers.1.input_layernorm.weight",
    "gpt_neox.final_layer_norm.weight",
    "embed_out.weight",
]
OPT = [
    "model.decoder.embed_positions.weight",
    "model.decoder.embed_tokens.weight",
    "model.decoder.layers.0.self_attn_layer_norm.weight",
    "model.decoder.layers.0.self_attn.k_proj.weight",
    "model.decoder.layers.0.fc1.weight",
    "model.decoder.final_layer_norm.weight",
    "lm_head.weight",
]
MULTIMODAL = [
    "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
    "model.vision_tower.encoder.layers.30.self_attn.q_proj.weight",
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.language_model.layers.1.self_attn.q_proj.weight",
    "model.language_model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("names", [LLAMA, GPT2, NEOX, OPT, MULTIMODAL], ids=lambda names: names[-2])
def test_embedding_then_layers_then_norm_then_head(names: list[str]) -> None:
    shuffled = random.Random(3).sample(names, len(names))

    assert [placed.name for placed in execution_order(shuffled)] == names


def test_a_tensor_knows_its_layer_and_the_others_have_none() -> None:
    layers = {placed.name: placed.layer for placed in execution_order(LLAMA)}

    assert layers["model.layers.10.self_attn.q_proj.weight"] == 10
    assert layers["model.layers.0.mlp.experts.10.up_proj.weight"] == 0
    assert layers["model.norm.weight"] is None


def test_layers_of_another_tower_are_not_layers_of_the_decoder() -> None:
    layers = {placed.name: placed.layer for placed in execution_order(MULTIMODAL)}

    assert layers["model.vision_tower.encoder.layers.30.self_attn.q_proj.weight"] is None
    assert layers["model.language_model.layers.1.self_attn.q_proj.weight"] == 1


def test_an_encoder_alone_has_layers() -> None:
    (placed,) = execution_order(["encoder.layer.3.attention.self.query.weight"])

    assert placed.layer == 3


def test_names_without_any_pattern_are_all_kept() -> None:
    assert {placed.name for placed in execution_order(["b", "a", "²", "x.٣.y"])} == {"a", "b", "²", "x.٣.y"}


@pytest.mark.parametrize("names", [LLAMA, GPT2, NEOX, OPT, MULTIMODAL], ids=lambda names: names[-2])
def test_each_model_has_one_embedding_and_one_head(names: list[str]) -> None:
    assert sum(map(is_input_embedding, names)) == 1
    assert [name for name in names if is_output_head(name)] == [names[-1]]
