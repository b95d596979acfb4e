"""From a `config.json` to a transformers model that this worker's engine can run, as yet without weights.

`build_skeleton` makes the modules (on the meta device) and small computed buffers; what the engine can't run
is refused. `stoker.models.weights.assign_weights` then makes tensors the modules' parameters as they are.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from services.worker.engine.attention import ATTENTION_NAME, register_attention
from stoker.errors import CheckpointInvalid
from stoker.models.skeleton import Skeleton, empty_model

if TYPE_CHECKING:
    from collections.abc import Mapping

SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
BATCH_DEPENDENT_ROPES = frozenset({"dynamic", "longrope"})
"""Rotary variants whose frequencies follow the longest session of a batch."""

POPULAR_ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "GPT2LMHeadModel",
)
"""Imported before a worker has a model, for transformers imports their modules at first use: 40 to 200 ms."""


@cache
def supported_architectures() -> frozenset[str]:
    """Return the class names of transformers' causal language models, e.g. `LlamaForCausalLM`."""
    names: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update((value,) if isinstance(value, str) else value)
    return frozenset(names)


def import_popular_architectures() -> None:
    """Import the model classes that a load is likely to ask for; others cost their import when they come."""
    for name in POPULAR_ARCHITECTURES:
        getattr(transformers, name)


def build_skeleton(config_json: Mapping[str, Any], *, device: torch.device | None = None) -> Skeleton:
    """Build the modules that a `config.json` describes, without weights.

    Args:
        config_json: The file's content.
        device: Where the model will run: where computed buffers go. None is the CPU.

    Raises:
        CheckpointInvalid: The architecture is unknown, or needs something this engine doesn't have.
    """
    register_attention()
    architecture, model_class, config = _resolve(config_json)
    _refuse_unsupported(architecture, model_class, config)
    config._attn_implementation = ATTENTION_NAME  # noqa: SLF001 - transformers gives it no other name
    config.use_cache = False
    return empty_model(model_class, config, device=device)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the model's stack of decoder layers.

    Raises:
        CheckpointInvalid: There is no such stack.
    """
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise CheckpointInvalid(f"{type(model).__name__} has no list of {count} decoder layers")


def _resolve(config_json: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """Return architecture, model class and config."""
    names = config_json.get("architectures") or []
    architecture = str(names[0]) if names else "no architecture"
    if architecture not in supported_architectures():
        raise CheckpointInvalid(
            f"config.json names {architecture}, which is not a causal language model of transformers "
            f"{transformers.__version__}; serve another checkpoint or a newer transformers"
        )
    model_type = str(config_json.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise CheckpointInvalid(f"config.json of {architecture} names the unknown model_type {model_type!r}")
    try:
        config = CONFIG_MAPPING[model_type].from_dict(dict(config_json))
    except Exception as error:  # validators of many model types raise many kinds
        raise CheckpointInvalid(f"config.json of {architecture} is not valid: {error}") from error
    return architecture, getattr(transformers, architecture), config


def _refuse_unsupported(architecture: str, model_class: Any, config: Any) -> None:
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    rope_types = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    reasons = {
        "it doesn't use transformers' attention interface": not model_class._supports_attention_backend,  # noqa: SLF001 - transformers' only sign
        "it keeps recurrent state instead of keys and values": getattr(model_class, "_is_stateful", False),
        "it has an encoder": bool(getattr(config, "is_encoder_decoder", False)),
        "its layers share keys and values": bool(getattr(text, "num_kv_shared_layers", 0)),
        "its weights are quantised": getattr(config, "quantization_config", None) is not None,
        "it has layers that are neither full nor sliding attention": not (
            set(getattr(text, "layer_types", None) or ()) <= SUPPORTED_LAYER_TYPES
        ),
        "its rotary embedding depends on the batch": bool(rope_types & BATCH_DEPENDENT_ROPES),
    }
    for reason, holds in reasons.items():
        if holds:
            raise CheckpointInvalid(f"{architecture} can't be served by this engine: {reason}")
