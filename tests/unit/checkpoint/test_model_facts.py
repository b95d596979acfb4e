"""Claims about what `config.json` tells."""

from __future__ import annotations

import json

import pytest

from stoker.checkpoint.model_facts import ModelFacts, read_facts
from stoker.errors import CheckpointInvalid


def facts(**config: object) -> ModelFacts:
    return read_facts(json.dumps(config).encode(), where="config.json")


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"])
def test_the_context_is_found_under_each_of_its_names(key: str) -> None:
    assert facts(**{key: 77}).context_length == 77


def test_a_multimodal_models_text_part_is_asked_too() -> None:
    found = facts(
        architectures=["X"],
        text_config={"max_position_embeddings": 5, "vocab_size": 6, "tie_word_embeddings": True},
    )

    assert (found.context_length, found.vocab_size, found.ties_embeddings) == (5, 6, True)


def test_a_fact_of_the_wrong_type_is_no_fact() -> None:
    found = facts(
        architectures="X", model_type=3, max_position_embeddings="9", vocab_size=True, tie_word_embeddings=1
    )

    assert found == ModelFacts(
        architecture=None, model_type=None, context_length=None, vocab_size=None, ties_embeddings=None
    )


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"a":1,"a":2}', b"\xff"])
def test_what_is_not_an_object_is_refused(text: bytes) -> None:
    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        read_facts(text, where="config.json")
