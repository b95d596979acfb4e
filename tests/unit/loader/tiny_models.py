"""Random models of popular architectures, small enough to build in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

_SIZE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZE},
    "llama_tied": {"model_type": "llama", **_SIZE, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **_SIZE},
    "qwen3": {"model_type": "qwen3", **_SIZE, "head_dim": 16},
    "gemma2": {"model_type": "gemma2", **_SIZE, "head_dim": 16},
    "gemma3": {"model_type": "gemma3_text", **_SIZE, "head_dim": 16},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 96,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
    },
    "phi3": {"model_type": "phi3", **_SIZE, "pad_token_id": 0},
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> transformers.PreTrainedModel:
    """The same random model each time; biases and norms are random too: none can go missing unseen."""
    fields = {**CONFIGS[name], **changes}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.bos_token_id, config.eos_token_id = 1, 2
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype).eval()


def token_ids(count: int = 7) -> torch.Tensor:
    """A prompt."""
    return torch.arange(3, 3 + count)[None]


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    """What the model says after the prompt, for every position."""
    with torch.no_grad():
        return model(token_ids()).logits
