"""The order in which a model uses its tensors, from their names alone. Pure.

Order: what feeds the model (other towers, embeddings, position tables), then decoder layers 0 … n-1, then the
final norm, then the head. A prefix of the file is then a runnable prefix of the model. Names are matched by
pattern (`model.layers.3.`, `transformer.h.3.`, `gpt_neox.layers.3.`, `model.decoder.layers.3.`, …); a name
that no pattern knows goes before the layers, where waiting for it costs nothing that is not paid anyway.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|decoder_layers|resblocks)\.(\d{1,6})\.")
_FEEDER = re.compile(r"(?:^|[._])(?:vision|visual|audio|image|encoder|projector|connector)(?:[._]|$)")
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|wpe|word_embeddings|tok_embeddings|embed_in|embed_positions|shared|"
    r"embeddings?|word_embeddings_layernorm|embed_layer_norm)(?:\.|$)"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|output_layer|score|classifier)(?:\.|$)")
_NORM = re.compile(r"(?:^|\.)(?:norm|norm_f|ln_f|final_norm|final_layer_norm|final_layernorm|ln_out)(?:\.|$)")
_NUMBER = re.compile(r"(\d+)")
_INSIDE_LAYER: tuple[re.Pattern[str], ...] = (
    re.compile(r"\.(?:input_layernorm|ln_1|attention_norm|self_attn_layer_norm|norm1|ln1)\."),
    re.compile(r"\.(?:self_attn|attn|attention|self_attention|mixer|linear_attn|temporal_block)\."),
    re.compile(r"\.(?:post_attention_layernorm|pre_feedforward_layernorm|ln_2|ffn_norm|norm2|ln2)\."),
    re.compile(r"\.(?:gate|router)\."),
)


class _Phase(IntEnum):
    FEEDER = 0
    EMBEDDING = 1
    UNKNOWN = 2
    LAYER = 3
    NORM = 4
    HEAD = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A tensor's name and the decoder layer that uses it (None outside the layers)."""

    name: str
    layer: int | None


def execution_order(names: Iterable[str]) -> tuple[Placed, ...]:
    """Return `names` in the order of execution. The result does not depend on the order they come in."""
    known = sorted(set(names))
    main = _main_stack(known)
    return tuple(
        Placed(name=name, layer=_layer(name, main))
        for name in sorted(known, key=lambda name: _key(name, main))
    )


def is_input_embedding(name: str) -> bool:
    """Say whether `name` is a table of token embeddings, which a head may be tied to."""
    return (
        re.search(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight$", name)
        is not None
    )


def is_output_head(name: str) -> bool:
    """Say whether `name` is the matrix that turns the last hidden state into logits."""
    return re.search(r"(?:^|\.)(?:lm_head|embed_out|output)\.weight$", name) is not None


def _main_stack(names: list[str]) -> str | None:
    """Return the prefix of the stack of layers that generates: the one with most tensors.

    Encoders count only where there is nothing else, as in a model that embeds.
    """
    stacks: Counter[tuple[bool, str]] = Counter()
    for name in names:
        if match := _LAYER.search(name):
            prefix = name[: match.start(1)]
            stacks[_FEEDER.search(prefix) is None, prefix] += 1
    best = max(stacks, key=lambda stack: (stack[0], stacks[stack], stack[1]), default=None)
    return best[1] if best else None


def _layer(name: str, main: str | None) -> int | None:
    match = _LAYER.search(name)
    return int(match[1]) if match and name[: match.start(1)] == main else None


def _phase(name: str, main: str | None) -> _Phase:
    if _layer(name, main) is not None:
        return _Phase.LAYER
    if _HEAD.search(name):
        return _Phase.HEAD
    if _FEEDER.search(name) or _LAYER.search(name):
        return _Phase.FEEDER
    if _EMBEDDING.search(name):
        return _Phase.EMBEDDING
    return _Phase.NORM if _NORM.search(name) else _Phase.UNKNOWN


def _key(name: str, main: str | None) -> tuple[int, int, int, tuple[tuple[int, int | str], ...]]:
    inside = next(
        (rank for rank, pattern in enumerate(_INSIDE_LAYER) if pattern.search(name)), len(_INSIDE_LAYER)
    )
    layer = _layer(name, main)
    return _phase(name, main), -1 if layer is None else layer, inside, _natural(name)


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a key that puts expert 2 before expert 10."""
    return tuple(
        (0, int(part)) if part.isdecimal() and part.isascii() else (1, part) for part in _NUMBER.split(name)
    )
