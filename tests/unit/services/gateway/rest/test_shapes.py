"""Hand-built chunks are the JSON that OpenAI's client reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion import Completion

from services.gateway.rest.shapes import ChatShape, Collected, CompletionShape, usage
from services.gateway.sessions.session import Alternative, Delta, ScoredToken

TOKEN = ScoredToken(raw=b"\xf0", logprob=float("-inf"), offset=3, top=(Alternative(raw=b"a", logprob=-0.5),))


def shape(cls: type[Any], *, include_usage: bool = False, logprobs: bool = False) -> Any:
    return cls(
        answer_id="id-1",
        created_unix_seconds=7,
        model='m"\n',
        include_usage=include_usage,
        logprobs=logprobs,
    )


def messages(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n\n")
    return [json.loads(message.removeprefix("data: ")) for message in text.split("\n\n")[:-1]]


@given(st.text())
@pytest.mark.parametrize("cls", [ChatShape, CompletionShape])
def test_any_text_is_one_line_that_reads_back(cls: type[Any], text: str) -> None:
    chunk = shape(cls).chunk(0, Delta(text=text, finish_reason="stop"))

    assert len(chunk.splitlines()) == 2 * chunk.count("data: ")
    read = messages(chunk)
    got = "".join(
        m["choices"][0].get("text") or m["choices"][0].get("delta", {}).get("content", "") for m in read
    )
    assert got == text


def test_chat_chunks_are_what_the_client_expects() -> None:
    chat = shape(ChatShape, include_usage=True)
    stream = (
        chat.opening(1)
        + chat.chunk(1, Delta(text="hi", tokens=(TOKEN,)))
        + chat.chunk(1, Delta(finish_reason="stop"))
    )
    stream += chat.usage_chunk(usage(3, 4))
    chunks = [ChatCompletionChunk.model_validate(message, strict=True) for message in messages(stream)]

    assert [chunk.choices[0].delta.content for chunk in chunks[:-1]] == ["", "hi", None]
    assert chunks[1].choices[0].logprobs.content[0].bytes == [0xF0]
    assert chunks[1].choices[0].logprobs.content[0].logprob == -9999.0
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens == 7
    assert {(chunk.id, chunk.created, chunk.model) for chunk in chunks} == {("id-1", 7, 'm"\n')}


def test_completion_chunks_are_what_the_client_expects() -> None:
    text = shape(CompletionShape).chunk(0, Delta(text="hi", tokens=(TOKEN,), finish_reason="length"))
    chunk = Completion.model_validate(messages(text)[0], strict=True)

    assert (chunk.choices[0].text, chunk.choices[0].finish_reason) == ("hi", "length")
    assert chunk.choices[0].logprobs.text_offset == [3]
    assert chunk.choices[0].logprobs.top_logprobs == [{"\ufffd": -9999.0, "a": -0.5}]


def test_a_delta_that_adds_nothing_makes_no_chunk() -> None:
    assert shape(ChatShape).chunk(0, Delta()) == ""
    assert shape(CompletionShape).chunk(0, Delta()) == ""
    assert shape(ChatShape).usage_chunk(usage(1, 1)) == ""


def test_whole_answers_are_what_the_client_expects() -> None:
    collected = Collected()
    collected.add(Delta(text="he"))
    collected.add(Delta(text="y", tokens=(TOKEN,), finish_reason="stop"))

    chat = shape(ChatShape, logprobs=True).whole([collected], usage(1, 2))
    completion = shape(CompletionShape).whole([collected], usage(1, 2))
    assert ChatCompletion.model_validate_json(chat).choices[0].message.content == "hey"
    assert Completion.model_validate_json(completion).choices[0].text == "hey"
    assert Completion.model_validate_json(completion).choices[0].logprobs is None
