"""A model's text side comes from its small files alone."""

from __future__ import annotations

import json

import pytest
from tokenizers import processors

from services.gateway.text.model_text import GenerationDefaults, ModelText
from stoker.errors import CheckpointInvalid, InvalidRequest
from tests.unit.services.gateway.text.tokenizers_for_tests import EOS, byte_level

TOKENIZER = byte_level()
END = TOKENIZER.token_to_id(EOS)


def files(**changed: object) -> dict[str, bytes]:
    named = {"tokenizer_config": {"eos_token": EOS}, "generation_config": {"eos_token_id": 3}} | changed
    return {"tokenizer.json": TOKENIZER.to_str().encode()} | {
        f"{name}.json": json.dumps(value).encode() for name, value in named.items()
    }


def test_end_tokens_are_the_generation_configs_and_the_tokenizers() -> None:
    assert ModelText(files()).stop_token_ids == (3, END)
    assert ModelText(files(generation_config={"eos_token_id": [7, 3]})).stop_token_ids == (3, 7, END)
    assert ModelText(files(generation_config={}, config={"eos_token_id": 9})).stop_token_ids == (9, END)


def test_special_tokens_may_be_objects() -> None:
    config = {"eos_token": {"content": EOS, "lstrip": False}, "chat_template": "{{ eos_token }}"}
    text = ModelText(files(tokenizer_config=config))

    assert text.render_chat([{"role": "user", "content": ""}]) == EOS


def test_sampling_defaults_out_of_range_do_not_count() -> None:
    config = {"temperature": 0.6, "top_k": 50, "top_p": 7, "min_p": "no", "repetition_penalty": True}

    assert ModelText(files(generation_config=config)).defaults == GenerationDefaults(
        temperature=0.6, top_k=50
    )


def test_completions_get_the_opening_tokens_and_conversations_do_not() -> None:
    opened = byte_level()
    opened.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, END)])
    text = ModelText(files() | {"tokenizer.json": opened.to_str().encode()})

    assert text.encode("he", add_special_tokens=True)[0] == END
    assert END not in text.encode("he", add_special_tokens=False)


def test_truncation_and_padding_written_into_a_tokenizer_are_ignored() -> None:
    cut = byte_level()
    cut.enable_truncation(2)
    cut.enable_padding(length=50)
    text = ModelText(files() | {"tokenizer.json": cut.to_str().encode()})

    assert len(text.encode("abcdef", add_special_tokens=True)) == 6


def test_without_a_template_a_conversation_is_refused_and_completions_are_named() -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        ModelText(files()).render_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", b"{}", "tokenizer.json cannot be read"),
        ("generation_config.json", b"{", "generation_config.json is not JSON"),
        ("tokenizer_config.json", b"[]", "holds a list"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_unusable_files_are_the_checkpoints_fault(name: str, content: bytes | None, message: str) -> None:
    changed = files()
    if content is None:
        del changed[name]
    else:
        changed[name] = content

    with pytest.raises(CheckpointInvalid, match=message):
        ModelText(changed)
