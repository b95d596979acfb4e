"""The official `openai` client against the real gateway: what it asks is what it gets."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.integration.gateway.fake_cluster import FakeCluster, says, says_its_seed
from tests.integration.gateway.gateway_process import GatewayProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES = [{"role": "user", "content": "hi"}]


async def test_a_conversation_is_answered_whole(cluster: FakeCluster, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)

    assert answer.choices[0].message.content == "Hello!"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    special = prompt.count("<|")
    expected = len(prompt) - 12 * 2 - 10 + special
    assert answer.usage.prompt_tokens == expected
    assert answer.usage.completion_tokens == len("Hello!") + 1
    assert list(cluster.agent.orders[0].sampling.stop_token_ids) == [257]
    assert cluster.agent.orders[0].sampling.top_k == 40


async def test_a_stream_brings_the_same_text_and_its_usage(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello!"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 7
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


async def test_the_synchronous_client_streams_too(cluster: FakeCluster, gateway: GatewayProcess) -> None:
    def ask() -> str:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as sync:
            stream = sync.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == "Hello!"


async def test_characters_split_over_tokens_arrive_whole(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.agent.script = says("né 😀 你好")
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]

    assert "".join(pieces) == "né 😀 你好"
    assert "😀" in pieces


async def test_several_choices_have_seeds_of_their_own(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.agent.script = says_its_seed()
    first = await client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, seed=5)
    again = await client.chat.completions.create(model="tiny", messages=MESSAGES, n=3, seed=5)

    texts = [choice.message.content for choice in first.choices]
    assert texts[0] == "5"
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]


async def test_streamed_choices_are_told_apart_by_index(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, n=2, stream=True)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""

    assert texts == ["Hello!", "Hello!"]


async def test_a_stop_string_across_tokens_is_never_shown(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.agent.script = says("one STO two STOP three")
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, stop=["STOP", "never"], stream=True
    )
    chunks = [chunk async for chunk in stream]

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one STO two "
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_the_token_limit_ends_with_length(cluster: FakeCluster, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=3)

    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hel", "length")


async def test_log_probabilities_come_with_tokens_and_bytes(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.agent.script = says("aé")
    answer = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content

    assert b"".join(bytes(token.bytes) for token in content).decode() == "aé"
    assert content[0].token == "a"  # noqa: S105 - a token of text
    assert len(content[0].top_logprobs) == 2
    assert content[0].top_logprobs[0].logprob == content[0].logprob


async def test_streamed_log_probabilities_equal_the_whole_ones(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.agent.script = says("aé STOP")
    common = {"model": "tiny", "messages": MESSAGES, "logprobs": True, "stop": "STOP"}
    whole = await client.chat.completions.create(**common)
    stream = await client.chat.completions.create(**common, stream=True)
    streamed = [
        token
        async for chunk in stream
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]

    assert streamed == whole.choices[0].logprobs.content
    assert (
        "".join(scored.token for scored in streamed if len(scored.bytes) == 1 and scored.bytes[0] < 128)
        == "a "
    )


async def test_completions_continue_texts_and_tokens(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    texts = await client.completions.create(model="tiny", prompt=["a", "b"], logprobs=0)
    tokens = await client.completions.create(model="tiny", prompt=[1, 2, 3], max_tokens=2)

    assert [choice.text for choice in texts.choices] == ["Hello!", "Hello!"]
    assert texts.choices[0].logprobs.tokens == list("Hello!")
    assert texts.choices[0].logprobs.text_offset == [0, 1, 2, 3, 4, 5]
    assert tokens.choices[0].text == "He"
    assert list(cluster.agent.orders[-1].prompt_token_ids) == [1, 2, 3]


async def test_completions_stream(cluster: FakeCluster, client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="tiny", prompt="x", stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "Hello!"
    assert chunks[-1].usage.total_tokens == 1 + 7


async def test_models_are_listed_and_found_by_name(cluster: FakeCluster, client: openai.AsyncOpenAI) -> None:
    cluster.controller.push(cluster.route("org/nested-name"))
    found = await client.models.retrieve("org/nested-name")
    listed = await client.models.list()

    assert found.id == "org/nested-name"
    assert {"tiny", "org/nested-name"} <= {model.id for model in listed.data}


async def test_an_unknown_model_is_not_found_and_near_names_are_told(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny'") as caught:
        await client.chat.completions.create(model="tinyy", messages=MESSAGES)

    assert caught.value.code == "model_not_found"


async def test_a_prompt_beyond_the_context_is_refused(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as caught:
        await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x" * 5000}], stream=True
        )

    assert caught.value.code == "context_length_exceeded"
    assert cluster.agent.orders == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 3), ("top_p", 0), ("n", 0), ("max_tokens", 0), ("tools", [{"type": "function"}])],
)
async def test_values_out_of_range_name_their_field(
    cluster: FakeCluster, client: openai.AsyncOpenAI, field: str, value: object
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={field: value})

    assert caught.value.param == field


async def test_the_chat_template_refuses_in_its_own_words(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match="this model knows no tools"):
        await client.chat.completions.create(
            model="tiny", messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]
        )


async def test_a_model_without_template_points_to_completions(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.controller.push(cluster.route("plain", template=False))
    with pytest.raises(openai.BadRequestError, match="/v1/completions"):
        await client.chat.completions.create(model="plain", messages=MESSAGES)
