from __future__ import annotations

import pytest
import torch

from services.worker.model_loading import (
    build_skeleton,
    supported_architectures,
)
from stoker.errors import CheckpointInvalid
from stoker.models.weights import assign_weights
from tests.unit.services.worker.tiny_models import CONFIGS, config_json, reference


def tensors_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_skeleton_computes_the_buffers_that_no_checkpoint_holds(name) -> None:
    model = reference(name)

    skeleton = build_skeleton(config_json(model))

    for buffer, wanted in model.named_non_persistent_buffers():
        assert torch.equal(skeleton.model.get_buffer(buffer), wanted)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_weights_are_used_where_they_lie() -> None:
    model = reference("llama")
    tensors = tensors_of(model)

    loaded = assign_weights(build_skeleton(config_json(model)), tensors)

    assert {n: p.data_ptr() for n, p in loaded.named_parameters()} == {
        n: t.data_ptr() for n, t in tensors.items()
    }
    assert not loaded.training


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_stored_once_are_shared_whichever_name_they_have(kept) -> None:
    model = reference("llama_tied")
    tensors = tensors_of(model)
    for name in {"lm_head.weight", "model.embed_tokens.weight"} - {kept}:
        tensors.pop(name)

    loaded = assign_weights(build_skeleton(config_json(model)), tensors)

    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.data_ptr() == tensors[kept].data_ptr()


def test_filler_tensors_are_ignored() -> None:
    model = reference("llama")
    tensors = {**tensors_of(model), "__stoker_pad__.0": torch.zeros(12, dtype=torch.uint8)}

    assign_weights(build_skeleton(config_json(model)), tensors)


def test_a_tensor_of_another_dtype_than_the_rest_is_cast() -> None:
    model = reference("llama", torch.bfloat16)
    tensors = tensors_of(model)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    loaded = assign_weights(build_skeleton(config_json(model)), tensors)

    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_names_without_the_base_models_prefix_are_understood() -> None:
    """The original GPT-2 checkpoint was saved from the bare base model."""
    model = reference("gpt2")
    tensors = {name.removeprefix("transformer."): t for name, t in tensors_of(model).items()}
    tensors.pop("lm_head.weight")

    loaded = assign_weights(build_skeleton(config_json(model)), tensors)

    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)


def test_missing_and_unexpected_tensors_are_named() -> None:
    model = reference("llama")
    tensors = tensors_of(model)
    tensors["model.extra"] = tensors.pop("model.layers.1.mlp.up_proj.weight")

    with pytest.raises(CheckpointInvalid, match=r"missing model\.layers\.1\.mlp\.up_proj.*model\.extra"):
        assign_weights(build_skeleton(config_json(model)), tensors)


def test_a_tensor_of_the_wrong_shape_is_named() -> None:
    model = reference("llama")
    tensors = tensors_of(model)
    tensors["model.norm.weight"] = torch.ones(63)

    with pytest.raises(CheckpointInvalid, match=r"model\.norm\.weight is \[63\], not \[64\]"):
        assign_weights(build_skeleton(config_json(model)), tensors)


def test_a_checkpoint_without_numbers_is_refused() -> None:
    with pytest.raises(CheckpointInvalid, match="floating"):
        assign_weights(build_skeleton(config_json(reference("llama"))), {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["BertModel"]}, "BertModel"),
        ({"architectures": None}, "no architecture"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "attention interface"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "MambaForCausalLM"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"num_attention_heads": "many"}, "LlamaForCausalLM"),
    ],
)
def test_what_the_engine_cannot_serve_is_refused_with_its_reason(change, reason) -> None:
    with pytest.raises(CheckpointInvalid, match=reason):
        build_skeleton({**config_json(reference("llama")), **change})


def test_the_popular_architectures_are_supported() -> None:
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"} <= supported_architectures()
