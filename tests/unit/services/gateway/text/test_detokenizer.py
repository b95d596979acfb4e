"""Detokenizers show the same text one token at a time as all at once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from services.gateway.text.model_text import ModelText
from tests.unit.services.gateway.text.tokenizers_for_tests import EOS, byte_level, sentencepiece


def model_text(tokenizer: Tokenizer) -> ModelText:
    config = json.dumps({"eos_token": EOS}).encode()
    return ModelText({"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": config})


BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece()
BYTE_LEVEL_TEXT, SENTENCEPIECE_TEXT = model_text(BYTE_LEVEL), model_text(SENTENCEPIECE)


def pieces(text: ModelText, token_ids: list[int]) -> list[str]:
    detokenizer = text.detokenizer()
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=40))
def test_any_byte_level_tokens_join_to_the_whole(token_ids: list[int]) -> None:
    """Also where the bytes are no UTF-8 at all."""
    assert "".join(pieces(BYTE_LEVEL_TEXT, token_ids)) == BYTE_LEVEL.decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_survives_a_byte_level_round_trip(text: str) -> None:
    assert "".join(pieces(BYTE_LEVEL_TEXT, BYTE_LEVEL_TEXT.encode(text, add_special_tokens=False))) == text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_through_sentencepiece_joins_to_the_whole(text: str) -> None:
    token_ids = SENTENCEPIECE_TEXT.encode(text, add_special_tokens=False)

    assert "".join(pieces(SENTENCEPIECE_TEXT, token_ids)) == SENTENCEPIECE.decode(token_ids)


WORDS = [
    token_id
    for name, token_id in SENTENCEPIECE.get_vocab().items()
    if not name.startswith("<0x") and name != "<unk>"
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=40))
def test_any_sentencepiece_words_join_to_the_whole(token_ids: list[int]) -> None:
    """Special tokens, leading spaces and a literal U+FFFD among them."""
    assert "".join(pieces(SENTENCEPIECE_TEXT, token_ids)) == SENTENCEPIECE.decode(token_ids)


@pytest.mark.parametrize("text", [BYTE_LEVEL_TEXT, SENTENCEPIECE_TEXT])
def test_an_emoji_is_held_until_its_last_byte(text: ModelText) -> None:
    token_ids = text.encode("😀", add_special_tokens=False)[-4:]

    assert pieces(text, token_ids) == ["", "", "", "😀", ""]


def test_an_incomplete_character_at_the_end_shows_as_replaced() -> None:
    token_ids = BYTE_LEVEL_TEXT.encode("😀", add_special_tokens=False)[:2]

    assert "".join(pieces(BYTE_LEVEL_TEXT, token_ids)) == "\ufffd"


def test_only_the_first_word_of_a_text_loses_its_space() -> None:
    hello = SENTENCEPIECE.token_to_id("▁hello")

    assert pieces(SENTENCEPIECE_TEXT, [hello, hello]) == ["hello", " hello", ""]


def test_special_tokens_show_no_text() -> None:
    end = BYTE_LEVEL.token_to_id(EOS)

    assert pieces(BYTE_LEVEL_TEXT, [end, end]) == ["", "", ""]


def test_endless_garbage_bytes_are_shown_and_not_kept() -> None:
    byte = SENTENCEPIECE.token_to_id("<0xFF>")
    shown = "".join(pieces(SENTENCEPIECE_TEXT, [byte] * 1000))

    assert len(shown) == 1000
