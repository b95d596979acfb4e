"""A session that goes on from an earlier run of itself keeps what both have in common."""

from __future__ import annotations

from dataclasses import replace

import torch

from services.worker.engine.protocol import Snapshot
from services.worker.engine.takeover import common_tokens
from stoker.ids import SessionId
from tests.unit.services.worker.tiny_models import ids, numbers, request, run


def earlier(prompt: tuple[int, ...], generated: tuple[int, ...] = ()) -> Snapshot:
    return Snapshot(
        session_id=SessionId("s"),
        prompt_token_ids=prompt,
        generated_token_ids=generated,
        sampling=request().sampling,
    )


def test_what_both_begin_with_is_in_common() -> None:
    assert common_tokens(request("s", (1, 2), generated=(3, 4, 5)), earlier((1, 2), (3, 9))) == 3
    assert common_tokens(request("s", (1, 2), generated=(3, 4)), earlier((1, 2), (3,))) == 3
    assert common_tokens(request("s", (1, 2)), earlier((1, 2), (3,))) == 2


def test_another_prompt_has_nothing_in_common() -> None:
    assert common_tokens(request("s", (7, 2)), earlier((1, 2))) == 0


def test_a_session_that_goes_on_from_an_earlier_run_gives_the_same_bits(engine_of) -> None:
    prompt, how = tuple(range(1, 41)), {"max_tokens": 24, "temperature": 0.8, "seed": 3, "top_logprobs": 2}
    whole = run(engine_of(dtype=torch.bfloat16), [request("s", prompt, **how)])[0]["s"]
    engine = engine_of(dtype=torch.bfloat16)
    engine.submit(request("old", prompt, generated=ids(whole[:9]), **how))
    for _ in range(4):
        engine.step()
    later = request("s", prompt, generated=ids(whole[:15]), **how)
    common = common_tokens(later, engine.snapshot(SessionId("old")))
    staged = engine.take_kv(SessionId("old"))
    engine.cancel(SessionId("old"))
    assert staged is not None
    staged.tokens = min(staged.tokens, common)

    engine.submit(replace(later, staged=staged))
    tokens, _ = run(engine)

    assert numbers(tokens["s"]) == numbers(whole[15:])
    assert engine.stats().replay_token_count < 9 + 15
    assert engine.stats().kv_tokens == 0
