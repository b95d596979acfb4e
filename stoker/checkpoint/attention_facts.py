"""What `config.json` says about attention: layers, heads, and so the size of the key/value cache. Pure.

Names differ between models; those below are what transformers' decoder models use. Where a model keeps a
compressed cache (multi-head latent attention: `kv_lora_rank`), that is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker.checkpoint import hostile_json
from stoker.checkpoint.dtypes import DTYPE_BITS

_NESTED_KEYS = ("text_config", "llm_config", "language_config")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEAD_KEYS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEAD_KEYS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
_HEAD_DIM_KEYS = ("head_dim", "attention_head_dim", "kv_channels")
_MAX_BYTES_PER_TOKEN = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFacts:
    """Sizes of the decoder's attention; 0 where the config does not say.

    Attributes:
        layers: Decoder layers.
        kv_heads: Heads of keys and values; fewer than query heads with grouped queries.
        head_dim: Elements of a head.
        latent_elements: Elements cached per token and layer instead of heads; 0 = it keeps heads.
    """

    layers: int
    kv_heads: int
    head_dim: int
    latent_elements: int

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Return the cache's bytes per token: layers * 2 * kv_heads * head_dim * width; 0 when not known.

        Args:
            dtype: Of the cache, a key of `DTYPE_BITS`; narrower ones than 16 bit count as 16: weights may be
                quantised to them, caches are not.
        """
        width_bytes = max(16, DTYPE_BITS.get(dtype, 16)) // 8
        per_layer = self.latent_elements or 2 * self.kv_heads * self.head_dim
        return min(self.layers * per_layer * width_bytes, _MAX_BYTES_PER_TOKEN)


def read_attention_facts(config_text: bytes, *, where: str) -> AttentionFacts:
    """Return the facts in the text of a `config.json`.

    Raises:
        CheckpointInvalid: It is not a JSON object.
    """
    config = hostile_json.parse_object(config_text, where=where)
    nested = [config[key] for key in _NESTED_KEYS if isinstance(config.get(key), dict)]
    scopes = [*nested, config]
    heads = _first(scopes, _HEAD_KEYS)
    hidden = _first(scopes, _HIDDEN_KEYS)
    one_kv_head = any(scope.get("multi_query") is True for scope in scopes)
    latent = _first(scopes, ("kv_lora_rank",))
    return AttentionFacts(
        layers=_first(scopes, _LAYER_KEYS),
        kv_heads=_first(scopes, _KV_HEAD_KEYS) or (1 if one_kv_head else heads),
        head_dim=_first(scopes, _HEAD_DIM_KEYS) or (hidden // heads if heads else 0),
        latent_elements=latent + _first(scopes, ("qk_rope_head_dim",)) if latent else 0,
    )


def _first(scopes: list[Mapping[str, Any]], keys: tuple[str, ...]) -> int:
    for scope in scopes:
        for key in keys:
            value = scope.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 20:
                return value
    return 0
