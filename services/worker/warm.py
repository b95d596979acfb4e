"""Become warm: run a toy model through all that a load and a first request will run.

So nothing of it is imported, compiled or started only when a request waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from services.worker.engine.protocol import EngineLimits, Sampling, Submit
from services.worker.engine.transformers_engine import TransformersEngine
from services.worker.model_loading import build_skeleton, import_popular_architectures
from stoker.ids import SessionId
from stoker.models.weights import assign_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

TOY: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
PROMPT_TOKENS = 16
OUTPUT_TOKENS = 4


def warm_up() -> None:
    """Load a toy model and generate with it, greedy and sampled. About a second; changes nothing else."""
    import_popular_architectures()
    skeleton = build_skeleton(TOY)
    weights = {
        name: torch.zeros(parameter.shape, dtype=torch.float32)
        for name, parameter in skeleton.model.named_parameters()
    }
    limits = EngineLimits(max_batch=2, max_waiting=0, max_context_tokens=64, max_kv_tokens=128)
    engine = TransformersEngine(assign_weights(skeleton, weights), limits)
    for index, temperature in enumerate((0.0, 1.0)):
        sampling = Sampling(temperature=temperature, max_tokens=OUTPUT_TOKENS, top_p=0.9, top_logprobs=1)
        prompt = [token % TOY["vocab_size"] for token in range(PROMPT_TOKENS)]
        engine.submit(
            Submit(session_id=SessionId(f"warm-{index}"), prompt_token_ids=prompt, sampling=sampling)
        )
    while engine.has_work():
        engine.step()
    engine.close()
