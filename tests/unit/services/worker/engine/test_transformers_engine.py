from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

from services.worker.engine.protocol import FinishReason, ResumeMode
from stoker.errors import ContextLengthExceeded, InvalidRequest, NotFound, QueueFull
from tests.unit.services.worker.tiny_models import CONFIGS, VOCAB, ids, numbers, reference, request, run

if TYPE_CHECKING:
    from services.worker.engine.protocol import Submit

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = (1, 5, 40, 70, 33, 12)


def prompts(lengths=LENGTHS) -> list[list[int]]:
    rng = random.Random(4)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


def mixed_requests(count: int, seed: int) -> list[Submit]:
    """Return requests of all kinds: greedy and sampled, short and long."""
    rng = random.Random(seed)
    return [
        request(
            f"s{i}",
            [rng.randrange(VOCAB) for _ in range(rng.randint(1, 80))],
            max_tokens=rng.randint(3, 24),
            temperature=rng.choice([0.0, 0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            seed=rng.getrandbits(64),
            top_logprobs=rng.choice([0, 3]),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_those_of_generate(name, engine_of) -> None:
    model = reference(name)
    wanted = [
        model.generate(
            (prompt := torch.tensor([tokens])),
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=30,
            do_sample=False,
            pad_token_id=0,
        )[0, len(tokens) :].tolist()
        for tokens in prompts()
    ]

    tokens, _ = run(engine_of(name), [request(str(i), p, max_tokens=30) for i, p in enumerate(prompts())])

    assert [ids(tokens[str(i)]) for i in range(len(LENGTHS))] == wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["llama", "llama_aligned", "llama_odd", "mistral_sliding", "gemma2", "gpt2", "qwen3_moe"]
)
def test_a_result_is_bitwise_independent_of_the_batch_and_its_order(name, dtype, engine_of) -> None:
    requests = mixed_requests(9, seed=3)
    alone = {r.session_id: numbers(run(engine_of(name, dtype), [r])[0][r.session_id]) for r in requests}
    rng = random.Random(5)
    for _ in range(2):
        rng.shuffle(requests)

        mixed, _ = run(engine_of(name, dtype), requests, arrivals=lambda _: rng.random() < 0.4)

        assert {session: numbers(outs) for session, outs in mixed.items()} == alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama_aligned", "llama_odd", "gpt2", "qwen3_moe"])
def test_exact_resume_gives_bitwise_the_remaining_tokens_at_every_position(name, dtype, engine_of) -> None:
    original = request(prompt=prompts()[2], max_tokens=16, temperature=0.8, seed=11, top_logprobs=2)
    whole = numbers(run(engine_of(name, dtype), [original])[0]["s"])
    resumed = [
        request(f"at{k}", original.prompt_token_ids, [row[1] for row in whole[:k]],
                max_tokens=16, temperature=0.8, seed=11, top_logprobs=2)
        for k in range(16)
    ]  # fmt: skip

    tokens, _ = run(engine_of(name, dtype), resumed)

    assert [numbers(tokens[f"at{k}"]) for k in range(16)] == [whole[k:] for k in range(16)]


def test_fast_resume_continues_in_fp32_with_the_same_tokens(engine_of) -> None:
    whole = ids(run(engine_of(), [request(prompt=prompts()[3], max_tokens=20)])[0]["s"])
    engine = engine_of()

    resumed, _ = run(engine, [request(prompt=prompts()[3], generated=whole[:9], mode=ResumeMode.FAST,
                                      max_tokens=20)])  # fmt: skip

    assert ids(resumed["s"]) == whole[9:]
    assert resumed["s"][0].position == 9
    assert engine.stats().replay_token_count == 0


@pytest.mark.parametrize("with_kv", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_a_snapshot_continues_elsewhere_bitwise(with_kv, steps, engine_of) -> None:
    original = request(prompt=prompts()[3], max_tokens=14, temperature=0.9, seed=2, top_logprobs=1)
    whole = numbers(run(engine_of(dtype=torch.bfloat16), [original])[0]["s"])
    source, destination = engine_of(dtype=torch.bfloat16), engine_of(dtype=torch.bfloat16)
    source.submit(original)
    for _ in range(steps):
        source.step()

    snapshot = source.snapshot("s", with_kv=with_kv)
    destination.resume(snapshot)
    rest, _ = run(destination)

    assert numbers(rest["s"]) == whole[len(snapshot.generated_token_ids) :]
    assert (snapshot.kv is not None) == with_kv
    assert (destination.stats().prefill_token_count == 0) == (with_kv and steps > 2)


def test_a_session_resumed_complete_only_ends(engine_of) -> None:
    done = request("full", generated=[4, 5], max_tokens=2)
    stopped = request("stop", generated=[9], stop_token_ids=frozenset({9}))

    tokens, ends = run(engine_of(), [done, stopped])

    assert tokens == {}
    assert (ends["full"].reason, ends["full"].generated_token_count) == (FinishReason.LENGTH, 2)
    assert (ends["stop"].reason, ends["stop"].stop_token_id) == (FinishReason.STOP, 9)


def test_a_stop_token_is_emitted_and_ends_the_session(engine_of) -> None:
    free = ids(run(engine_of(), [request()])[0]["s"])
    stop = free[4]
    first = free.index(stop)

    tokens, ends = run(engine_of(), [request(stop_token_ids=frozenset({stop}))])

    assert ids(tokens["s"]) == free[: first + 1]
    assert (ends["s"].reason, ends["s"].stop_token_id) == (FinishReason.STOP, stop)


def test_ignore_eos_runs_past_stop_tokens(engine_of) -> None:
    free = ids(run(engine_of(), [request()])[0]["s"])

    tokens, ends = run(engine_of(), [request(stop_token_ids=frozenset(free), ignore_eos=True)])

    assert ids(tokens["s"]) == free
    assert ends["s"].reason is FinishReason.LENGTH


def test_without_max_tokens_a_session_fills_the_context(engine_of) -> None:
    _, ends = run(engine_of(max_context_tokens=20), [request(max_tokens=None)])

    assert (ends["s"].reason, ends["s"].generated_token_count) == (FinishReason.LENGTH, 17)


def test_a_cancelled_session_gives_nothing_but_its_end_in_the_next_step(engine_of) -> None:
    engine = engine_of()
    engine.submit(request("gone"))
    engine.submit(request("stays"))
    engine.step()
    engine.cancel("gone")

    outputs = engine.step()

    assert [type(o).__name__ for o in outputs if o.session_id == "gone"] == ["Finished"]
    assert [o.reason for o in outputs if o.session_id == "gone"] == [FinishReason.CANCELLED]
    assert any(o.session_id == "stays" for o in outputs)


def test_a_waiting_session_can_be_cancelled_and_an_unknown_one_is_ignored(engine_of) -> None:
    engine = engine_of(max_batch=1)
    engine.submit(request("first"))
    engine.submit(request("second"))
    engine.cancel("second")
    engine.cancel("nobody")

    _, ends = run(engine)

    assert {s: e.reason for s, e in ends.items()} == {
        "first": FinishReason.LENGTH,
        "second": FinishReason.CANCELLED,
    }


def test_each_session_advances_by_at_most_one_token_per_step(engine_of) -> None:
    engine = engine_of()
    for i in range(5):
        engine.submit(request(str(i), prompts()[i]))
    while engine.has_work():
        sessions = [o.session_id for o in engine.step() if hasattr(o, "token_id")]

        assert len(sessions) == len(set(sessions))


def test_sessions_set_back_for_want_of_kv_give_the_same_bits(engine_of) -> None:
    requests = [
        request(str(i), prompts([100])[0][i:], max_tokens=80, temperature=0.9, seed=i, top_logprobs=0)
        for i in range(4)
    ]
    wanted, _ = run(engine_of(), requests)
    tight = engine_of(max_kv_tokens=640)

    got, _ = run(tight, requests)

    assert tight.stats().preempted_count > 0
    assert {s: numbers(o) for s, o in got.items()} == {s: numbers(o) for s, o in wanted.items()}
    assert tight.stats().kv_tokens == 0


def test_a_session_may_use_the_whole_kv_budget(engine_of) -> None:
    _, ends = run(engine_of(max_kv_tokens=150), [request(max_tokens=None)])

    assert ends["s"].generated_token_count == 147


def test_more_sessions_than_batch_and_queue_are_refused(engine_of) -> None:
    engine = engine_of(max_batch=1, max_waiting=1)
    engine.submit(request("a"))
    engine.submit(request("b"))

    with pytest.raises(QueueFull) as caught:
        engine.submit(request("c"))

    assert caught.value.retry_after_seconds is not None


def test_a_prompt_that_does_not_fit_the_context_is_refused_with_the_numbers(engine_of) -> None:
    engine = engine_of(max_context_tokens=16)

    with pytest.raises(ContextLengthExceeded, match="16"):
        engine.submit(request(prompt=[1] * 16, max_tokens=1))
    with pytest.raises(ContextLengthExceeded):
        engine.submit(request(prompt=[1] * 10, max_tokens=7))


@pytest.mark.parametrize("prompt", [[], [VOCAB], [-1]])
def test_impossible_prompts_are_refused(prompt, engine_of) -> None:
    with pytest.raises(InvalidRequest):
        engine_of().submit(request(prompt=prompt))


def test_a_session_id_in_use_is_refused(engine_of) -> None:
    engine = engine_of()
    engine.submit(request())

    with pytest.raises(InvalidRequest, match="already"):
        engine.submit(request())


def test_a_snapshot_of_an_unknown_session_is_not_found(engine_of) -> None:
    with pytest.raises(NotFound):
        engine_of().snapshot("nobody")


def test_broken_weights_end_the_session_with_an_error_not_the_engine(engine_of, models) -> None:
    engine = engine_of("llama_tied")
    weight = models("llama_tied").model.norm.weight
    saved = weight.clone()
    try:
        weight.fill_(float("nan"))
        _, ends = run(engine, [request()])
    finally:
        weight.copy_(saved)

    assert ends["s"].reason is FinishReason.ERROR
    assert "maximum" in ends["s"].message
    assert not engine.has_work()


def test_counts_and_timings_account_for_the_work(engine_of) -> None:
    engine = engine_of()

    tokens, ends = run(engine, [request(prompt=prompts()[3], max_tokens=5)])

    stats = engine.stats()
    assert (stats.prefill_token_count, stats.decode_token_count, stats.running) == (70, 5, 0)
    assert tokens["s"][0].timings is not None
    assert all(out.timings is None for out in tokens["s"][1:])
    assert ends["s"].timings.decode_seconds > 0


def test_the_first_pass_proves_that_every_layer_keeps_keys_and_values(engine_of) -> None:
    engine_of().first_pass()

    assert engine_of().stats().kv_tokens == 0
