"""Sampling: what the client asked, what the model's authors recommend, and what the worker is told.

The client's word wins, then the model's `generation_config.json`, then OpenAI's defaults (temperature 1,
everything else off).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.gateway.text.model_text import GenerationDefaults
from stoker.errors import ContextLengthExceeded
from stoker.v1 import session_pb2

SEED_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # splitmix64, Steele et al. 2014


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRequest:
    """Sampling as a client asked for it, values in range; None = left open."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    """Output tokens at most; None = as many as the context allows."""
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    """None = no log probabilities."""


def derive_seed(seed: int, choice: int) -> int:
    """Return a choice's own seed, 64 bits: choice 0 has the request's, others one scattered from it."""
    if choice == 0:
        return seed & SEED_MASK
    mixed = (seed + choice * _GOLDEN_GAMMA) & SEED_MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & SEED_MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & SEED_MASK
    return mixed ^ (mixed >> 31)


def output_budget(prompt_tokens: int, max_tokens: int | None, context_tokens: int) -> int | None:
    """Return how many tokens an answer may have; None = the context is not known and nothing was asked.

    Args:
        prompt_tokens: Length of the prompt.
        max_tokens: What the client asked; None = as many as fit.
        context_tokens: The model's limit for prompt and answer together; 0 = not known.

    Raises:
        ContextLengthExceeded: Prompt and answer do not fit; in the words OpenAI's clients look for.
    """
    if not context_tokens:
        return max_tokens
    limit = f"This model's maximum context length is {context_tokens} tokens."
    if prompt_tokens >= context_tokens:
        raise ContextLengthExceeded(
            f"{limit} However, your messages resulted in {prompt_tokens} tokens. Please reduce the length of "
            "the messages.",
            param="messages",
        )
    if max_tokens is None:
        return context_tokens - prompt_tokens
    if prompt_tokens + max_tokens > context_tokens:
        raise ContextLengthExceeded(
            f"{limit} However, you requested {prompt_tokens + max_tokens} tokens ({prompt_tokens} in the "
            f"messages, {max_tokens} in the completion). Please reduce the length of the messages or "
            "completion.",
            param="max_tokens",
        )
    return max_tokens


def resolve(
    asked: SamplingRequest,
    defaults: GenerationDefaults,
    *,
    model_stop_ids: Sequence[int],
    seed: int,
    max_tokens: int,
) -> session_pb2.Sampling:
    """Return the sampling a worker is told.

    Args:
        asked: What the client asked.
        defaults: What the model's authors recommend.
        model_stop_ids: The model's own end tokens; not used where the client ignores them.
        seed: The choice's own seed.
        max_tokens: Output tokens at most.
    """
    stop_ids = {*asked.stop_token_ids, *(() if asked.ignore_eos else model_stop_ids)}

    def chosen(client: float | None, model: float | None, otherwise: float) -> float:
        return client if client is not None else model if model is not None else otherwise

    sampling = session_pb2.Sampling(
        temperature=chosen(asked.temperature, defaults.temperature, 1.0),
        top_p=chosen(asked.top_p, defaults.top_p, 1.0),
        top_k=int(chosen(asked.top_k, defaults.top_k, 0)),
        min_p=chosen(asked.min_p, defaults.min_p, 0.0),
        repetition_penalty=chosen(asked.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=dict(asked.logit_bias),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=asked.min_tokens,
        stop_token_ids=sorted(stop_ids),
        ignore_eos=asked.ignore_eos and not asked.stop_token_ids,
    )
    if asked.top_logprobs is not None:
        sampling.top_logprobs = asked.top_logprobs
    return sampling
