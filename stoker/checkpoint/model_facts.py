"""What `config.json` says that others must know: architecture, context, vocabulary, ties. Pure.

Configurations nest the language model's part under `text_config` (multimodal models) and call the same thing
by several names; the lists below are those that transformers' models use. A fact that is not there, or of
the wrong type, is None: the engine that builds the model is who refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stoker.checkpoint import hostile_json

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_CONFIG_BYTES = 8 * 1024 * 1024
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
_VOCABULARY_KEYS = ("vocab_size", "n_vocab", "padded_vocab_size")
_NESTED_KEYS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts from `config.json`; None where it does not say.

    Attributes:
        architecture: The class that transformers builds, e.g. `LlamaForCausalLM`.
        model_type: e.g. `llama`.
        context_length: Most tokens of prompt and answer together.
        vocab_size: Rows of the embedding.
        ties_embeddings: Whether the head uses the embedding's tensor.
    """

    architecture: str | None
    model_type: str | None
    context_length: int | None
    vocab_size: int | None
    ties_embeddings: bool | None


NO_FACTS = ModelFacts(
    architecture=None, model_type=None, context_length=None, vocab_size=None, ties_embeddings=None
)
"""Of what has no `config.json`."""


def read_facts(config_text: bytes, *, where: str) -> ModelFacts:
    """Return the facts in the text of a `config.json`.

    Raises:
        CheckpointInvalid: It is not a JSON object.
    """
    config = hostile_json.parse_object(config_text, where=where)
    scopes = [config, *(config[key] for key in _NESTED_KEYS if isinstance(config.get(key), dict))]
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    ties = next((scope["tie_word_embeddings"] for scope in scopes if "tie_word_embeddings" in scope), None)
    model_type = config.get("model_type")
    return ModelFacts(
        architecture=first if isinstance(first, str) else None,
        model_type=model_type if isinstance(model_type, str) else None,
        context_length=_first_positive(scopes, _CONTEXT_KEYS),
        vocab_size=_first_positive(scopes, _VOCABULARY_KEYS),
        ties_embeddings=ties if isinstance(ties, bool) else None,
    )


def _first_positive(scopes: list[Mapping[str, Any]], keys: tuple[str, ...]) -> int | None:
    for scope in scopes:
        for key in keys:
            value = scope.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
