"""The oracle: whatever dies, and whenever, the client sees the bits of the run in which nothing died."""

from __future__ import annotations

import pytest

from services.gateway.text.model_text import ModelText
from stoker.v1 import session_pb2
from tests.integration.streams.engines import Answer, NewEngine, Replicas, answer

POSITIONS = 64
PROMPT = [(7 * i) % 200 + 20 for i in range(21)]
GREEDY = {"temperature": 0.0}
SAMPLED = {
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 50,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "min_tokens": 5,
    "logit_bias": {30: 1.5, 31: -2.0},
}


@pytest.fixture(scope="module")
def new_engine(each_engine: NewEngine) -> NewEngine:
    """In both dtypes: what is promised holds in each."""
    return each_engine


async def faultless(new_engine: NewEngine, text: ModelText, **how: object) -> Answer:
    return await answer(Replicas(new_engine), text, PROMPT, **how)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_kill_after_every_token_of_one_stream_changes_nothing(
    new_engine: NewEngine, text: ModelText, sampling: dict
) -> None:
    """Beside others: `test_oracle_of_mixed_batches`."""
    how = sampling | {"max_tokens": POSITIONS + 2, "top_logprobs": 3, "ignore_eos": True}
    wanted = await faultless(new_engine, text, **how)
    kills = range(POSITIONS + 1)
    replicas = Replicas(new_engine, tuple(kills))

    found = await answer(replicas, text, PROMPT, **how)

    assert found == wanted
    assert len(wanted.token_ids) == POSITIONS + 2
    assert [order.epoch for order in replicas.orders] == list(range(len(kills) + 1))
    assert [len(order.generated_token_ids) for order in replicas.orders] == [0, *kills]


async def test_a_stop_token_and_a_stop_string_end_a_resumed_answer_where_they_ended_it(
    new_engine: NewEngine, text: ModelText
) -> None:
    how = SAMPLED | {"max_tokens": 48, "top_logprobs": 1}
    ids = (await faultless(new_engine, text, **how, ignore_eos=True)).token_ids
    stop_id = ids[20]
    first = ids.index(stop_id)
    by_token = how | {"stop_token_ids": [stop_id], "min_tokens": 0}
    whole = await faultless(new_engine, text, **how, ignore_eos=True)
    by_string = how | {"ignore_eos": True, "stop": (whole.text[12:16],), "min_tokens": 0}

    for ended in (by_token, by_string):
        wanted = await faultless(new_engine, text, **ended)
        for position in (first // 2, first):
            assert await answer(Replicas(new_engine, (position,)), text, PROMPT, **ended) == wanted
        assert wanted.finish_reason == "stop"


async def test_a_replica_that_dies_while_it_prefills_a_long_prompt_changes_nothing(
    new_engine: NewEngine, text: ModelText
) -> None:
    prompt, how = [(5 * i) % 200 + 20 for i in range(150)], SAMPLED | {"max_tokens": 8, "ignore_eos": True}
    wanted = await answer(Replicas(new_engine), text, prompt, **how)

    found = await answer(Replicas(new_engine, (0, 0, 0, 2)), text, prompt, **how)

    assert found == wanted


async def test_fast_resume_is_asked_for_where_the_model_says_so_and_counts_the_same(
    new_engine: NewEngine, text: ModelText
) -> None:
    how = GREEDY | {"max_tokens": 24, "ignore_eos": True}
    replicas = Replicas(new_engine, (9,))

    found = await answer(replicas, text, PROMPT, resume="fast", **how)

    assert replicas.orders[1].resume_mode == session_pb2.RESUME_MODE_FAST
    assert len(found.token_ids) == 24
    assert found.token_ids[:9] == (await faultless(new_engine, text, **how)).token_ids[:9]


async def test_a_session_that_came_complete_only_gets_its_end(new_engine: NewEngine, text: ModelText) -> None:
    how = GREEDY | {"max_tokens": 6, "ignore_eos": True}
    wanted = await faultless(new_engine, text, **how)

    found = await answer(Replicas(new_engine, (6,), drop_finish=True), text, PROMPT, **how)

    assert found == wanted
