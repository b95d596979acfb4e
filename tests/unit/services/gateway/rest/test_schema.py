"""OpenAI's requests: what is understood, ignored and refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.gateway.rest.schema import ChatCompletionRequest, CompletionRequest, parse
from services.gateway.text_request import Conversation, Prompts
from stoker.errors import InvalidRequest

HI = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, json.dumps({"model": "m", "messages": [HI]} | fields).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "x"} | fields).encode())


def test_a_bare_request_leaves_everything_open() -> None:
    request = chat().to_text_request("q")

    assert request.choices == 1
    assert request.sampling.temperature is None
    assert request.sampling.max_tokens is None
    assert request.sampling.top_logprobs is None


def test_null_means_absent() -> None:
    nulls = dict.fromkeys(("temperature", "stop", "n", "seed", "logit_bias", "stream_options", "tools"))

    assert chat(**nulls).to_text_request("q") == chat().to_text_request("q")


def test_max_completion_tokens_wins_over_its_old_name() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).to_text_request("q").sampling.max_tokens == 7
    assert chat(max_tokens=5).to_text_request("q").sampling.max_tokens == 5


def test_completions_are_short_by_default() -> None:
    assert completion().to_text_request("q").sampling.max_tokens == 16


def test_one_stop_string_is_a_list_of_one() -> None:
    assert chat(stop="END").to_text_request("q").sampling.stop == ("END",)


def test_top_k_minus_one_is_off() -> None:
    assert chat(top_k=-1).to_text_request("q").sampling.top_k == 0


def test_parts_of_text_are_joined_and_developers_are_systems() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    content = chat(messages=[{"role": "developer", "content": parts}]).to_text_request("q").content

    assert isinstance(content, Conversation)
    assert content.messages == [{"role": "system", "content": "a\nb"}]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_are_texts_or_tokens_one_or_several(prompt: Any, prompts: list[Any]) -> None:
    request = completion(prompt=prompt, n=2).to_text_request("q")

    assert request.content == Prompts(prompts=prompts)
    assert request.sessions == 2 * len(prompts)


def test_logprobs_without_alternatives_show_the_token_itself() -> None:
    assert chat(logprobs=True).to_text_request("q").sampling.top_logprobs == 0
    assert completion(logprobs=3).to_text_request("q").sampling.top_logprobs == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 1.5}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": "x"}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"model": ""}, "model"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_what_cannot_be_done_is_refused_and_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"something_new": {"x": 1}},
    ],
)
def test_what_changes_nothing_is_ignored(fields: dict[str, Any]) -> None:
    assert chat(**fields).to_text_request("q") == chat().to_text_request("q")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_none_are_refused(value: str) -> None:
    with pytest.raises(InvalidRequest):
        parse(ChatCompletionRequest, f'{{"model":"m","messages":[],"temperature":{value}}}'.encode())


def test_a_missing_field_is_asked_for() -> None:
    with pytest.raises(InvalidRequest, match="you must provide messages"):
        parse(ChatCompletionRequest, b'{"model": "m"}')
