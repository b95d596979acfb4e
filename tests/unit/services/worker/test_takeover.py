"""A session that goes on from an earlier run of itself keeps what both have in common."""

from __future__ import annotations

import torch

from services.worker.engine import KvExport, Snapshot
from services.worker.takeover import continued
from stoker.ids import SessionId
from tests.unit.services.worker.tiny_models import ids, numbers, request, run


def earlier(prompt: tuple[int, ...], generated: tuple[int, ...], cached: int) -> Snapshot:
    layer = torch.arange(2 * 1 * cached * 1, dtype=torch.float32).reshape(2, 1, cached, 1)
    wanted = request("s", prompt)
    return Snapshot(
        session_id=SessionId("s"),
        prompt_token_ids=prompt,
        generated_token_ids=generated,
        sampling=wanted.sampling,
        kv=KvExport(token_count=cached, layers=(layer,)),
    )


def test_keys_of_the_common_prefix_are_kept() -> None:
    found = continued(request("s", (1, 2), generated=(3, 4, 5)), earlier((1, 2), (3, 9), 4))

    assert found.kv is not None
    assert found.kv.token_count == 3
    assert found.kv.layers[0].shape == (2, 1, 3, 1)
    assert found.generated_token_ids == (3, 4, 5)


def test_all_keys_are_kept_where_all_tokens_agree() -> None:
    before = earlier((1, 2), (3,), 2)

    assert continued(request("s", (1, 2), generated=(3, 4)), before).kv is before.kv


def test_nothing_is_kept_of_another_prompt_or_of_a_session_that_had_not_begun() -> None:
    assert continued(request("s", (7, 2)), earlier((1, 2), (), 2)).kv is None
    bare = Snapshot(
        session_id=SessionId("s"),
        prompt_token_ids=(1, 2),
        generated_token_ids=(),
        sampling=request().sampling,
    )
    assert continued(request("s", (1, 2)), bare).kv is None


def test_a_session_that_goes_on_from_an_earlier_run_gives_the_same_bits(engine_of) -> None:
    prompt, how = tuple(range(1, 41)), {"max_tokens": 24, "temperature": 0.8, "seed": 3, "top_logprobs": 2}
    whole = run(engine_of(dtype=torch.bfloat16), [request("s", prompt, **how)])[0]["s"]
    engine = engine_of(dtype=torch.bfloat16)
    engine.submit(request("old", prompt, generated=ids(whole[:9]), **how))
    for _ in range(4):
        engine.step()
    before = engine.snapshot(SessionId("old"), with_kv=True)
    engine.cancel(SessionId("old"))

    engine.resume(continued(request("s", prompt, generated=ids(whole[:15]), **how), before))
    tokens, _ = run(engine)

    assert before.kv is not None
    assert numbers(tokens["s"]) == numbers(whole[15:])
    assert engine.stats().replay_token_count < 9 + 15
