"""A request's content becomes tokens, or a refusal that names the field."""

from __future__ import annotations

from typing import Any

import pytest

from services.gateway.prompts import content_characters, encode_prompts
from services.gateway.sampling import SamplingRequest
from services.gateway.text_request import Conversation, Prompts, TextRequest
from stoker.errors import InvalidRequest
from tests.unit.services.gateway.builders import TEXT, ids_of


def request(content: Conversation | Prompts, **sampling: Any) -> TextRequest:
    return TextRequest(request_id="q", model="tiny", content=content, sampling=SamplingRequest(**sampling))


def test_a_conversation_is_rendered_and_encoded() -> None:
    chat = Conversation(messages=[{"role": "user", "content": "hi"}])

    assert encode_prompts(request(chat), TEXT, 0) == [ids_of("hi")]


def test_texts_and_tokens_may_be_mixed() -> None:
    assert encode_prompts(request(Prompts(prompts=["hi", [1, 2]])), TEXT, 0) == [ids_of("hi"), [1, 2]]


@pytest.mark.parametrize(
    ("content", "sampling", "param"),
    [
        (Prompts(prompts=[""]), {}, "prompt"),
        (Conversation(messages=[{"role": "user", "content": ""}]), {}, "messages"),
        (Prompts(prompts=[[100]]), {}, "prompt"),
        (Prompts(prompts=["a"]), {"stop_token_ids": [100]}, "stop_token_ids"),
        (Prompts(prompts=["a"]), {"logit_bias": {100: 1.0}}, "logit_bias"),
    ],
)
def test_empty_prompts_and_foreign_tokens_are_refused(
    content: Conversation | Prompts, sampling: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode_prompts(request(content, **sampling), TEXT, 100)
    assert caught.value.param == param


def test_the_amount_of_text_is_estimated_for_all_kinds() -> None:
    assert content_characters(request(Prompts(prompts=["abc", [1, 2]]))) == 5
    assert content_characters(request(Conversation(messages=[{"role": "user", "content": None}]))) == 0
