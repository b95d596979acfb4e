"""How many tokens of keys and values a number of bytes holds."""

from __future__ import annotations

from typing import Any

import torch

from stoker.errors import DoesNotFit


def kv_shape(config: Any) -> tuple[int, int, int]:
    """Return how many layers keep keys and values, for how many heads each, and the numbers of one head.

    Args:
        config: A transformers configuration of a decoder with attention in every layer.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.num_hidden_layers), int(heads), int(head_dim)


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers.

    Args:
        config: As for `kv_shape`.
        dtype: In which the model computes.
    """
    layers, heads, head_dim = kv_shape(config)
    return 2 * layers * heads * head_dim * dtype.itemsize


def max_kv_tokens(cache_bytes: int, per_token_bytes: int) -> int:
    """Return how many tokens fit.

    Raises:
        DoesNotFit: Not even one does.
    """
    tokens = cache_bytes // per_token_bytes
    if tokens == 0:
        raise DoesNotFit(
            f"a key/value cache of {cache_bytes} bytes holds no token: one needs {per_token_bytes} bytes; "
            "raise kv_cache_bytes"
        )
    return tokens
