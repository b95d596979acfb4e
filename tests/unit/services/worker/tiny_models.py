"""Tiny models and the loop that runs an engine to its end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from services.worker.engine.protocol import Sampling, Submit, TokenOut
from services.worker.model_loading import build_skeleton
from stoker.models.weights import assign_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.engine.protocol import Finished
    from services.worker.engine.transformers_engine import TransformersEngine

VOCAB = 512
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 60,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama_tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama_odd": lambda: LlamaConfig(**{**SHAPE, "hidden_size": 72, "intermediate_size": 100}, head_dim=12),
    "llama_aligned": lambda: LlamaConfig(
        **{**SHAPE, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    ),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "mistral_sliding": lambda: MistralConfig(**SHAPE, sliding_window=16),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=16, sliding_window=16, query_pre_attn_scalar=16),
    "gpt2": lambda: GPT2Config(**GPT2_SHAPE),
    "opt": lambda: OPTConfig(**SHAPE, ffn_dim=128, word_embed_proj_dim=64),
    "phi3": lambda: Phi3Config(**SHAPE),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


def reference(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model as transformers builds it."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype).eval()


def config_json(model: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(model.config.to_dict()))
    config["architectures"] = [type(model).__name__]
    return config


def served(model: Any) -> torch.nn.Module:
    """Return the model as a worker loads it: built from its config.json and its tensors."""
    return assign_weights(build_skeleton(config_json(model)), dict(model.state_dict()))


def request(session_id: str = "s", prompt=(1, 2, 3), generated=(), mode=None, **sampling: Any) -> Submit:
    extra = {} if mode is None else {"resume_mode": mode}
    return Submit(
        session_id=session_id,
        prompt_token_ids=prompt,
        generated_token_ids=generated,
        sampling=Sampling(**{"max_tokens": 12, **sampling}),
        **extra,
    )


def run(
    engine: TransformersEngine, requests=(), arrivals: Callable[[int], bool] = lambda _step: True
) -> tuple[dict[str, list[TokenOut]], dict[str, Finished]]:
    """Submit the requests as they arrive, step to the end; return tokens and ends by session."""
    tokens: dict[str, list[TokenOut]] = {}
    ends: dict[str, Finished] = {}
    waiting, step = list(requests), 0
    while waiting or engine.has_work():
        while waiting and (arrivals(step) or not engine.has_work()):
            engine.submit(waiting.pop(0))
        for out in engine.step():
            if isinstance(out, TokenOut):
                tokens.setdefault(out.session_id, []).append(out)
            else:
                ends[out.session_id] = out
        step += 1
    return tokens, ends


def ids(outs: list[TokenOut]) -> list[int]:
    return [out.token_id for out in outs]


def numbers(outs: list[TokenOut]) -> list[tuple[Any, ...]]:
    """Return all that a client could see of tokens, for bitwise comparison."""
    return [(out.position, out.token_id, out.logprob, out.top_logprobs) for out in outs]
