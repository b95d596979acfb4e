"""Keys and values that leave one engine and enter another: the session goes on with the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from services.worker.engine.protocol import Submit, TokenOut
from services.worker.kv.kv_exchange import KvReader
from services.worker.kv.kv_format import ALL_TOKENS, KvLayout, opened, sealed
from services.worker.kv.kv_store import KvBudget, SessionKv
from stoker.errors import CapacityError, KvDamaged, KvUnavailable
from stoker.ids import SessionId
from tests.unit.services.worker.tiny_models import numbers, request, run

if TYPE_CHECKING:
    from services.worker.engine.transformers_engine import TransformersEngine
    from services.worker.kv.kv_exchange import StagedKv

PROMPT = tuple(range(3, 48))
SAMPLED = {"temperature": 0.9, "top_k": 40, "seed": 5, "repetition_penalty": 1.2}


def shipped(reader: KvReader, destination: TransformersEngine, tokens: int | None = None) -> StagedKv:
    """Carry keys and values over, piece by piece."""
    staged = destination.stage_kv()
    end = len(reader.tokens) if tokens is None else tokens
    staged.extend(end)
    for first, stop in reader.layout.pieces(0, end):
        piece = sealed(first, reader.tokens[first:stop], reader.read(first, stop))
        data = opened(piece, destination.kv_layout, at=staged.tokens, end=end)
        staged.write(data, len(piece.token_ids))
    return staged


def stopped_after(engine: TransformersEngine, wanted: Submit, count: int) -> list[TokenOut]:
    """Run a session until it has so many tokens; it stays in the engine."""
    engine.submit(wanted)
    made: list[TokenOut] = []
    while len(made) < count:
        made += [
            out for out in engine.step() if isinstance(out, TokenOut) and out.session_id == wanted.session_id
        ]
    return made


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("llama", torch.float16),
        ("llama_odd", torch.bfloat16),
        ("mistral_sliding", torch.bfloat16),
        ("gemma2", torch.float32),
        ("gpt2", torch.float32),
    ],
)
def test_a_session_goes_on_elsewhere_from_shipped_keys_and_values_with_the_same_bits(
    engine_of, name: str, dtype: torch.dtype
) -> None:
    wanted = request(prompt=PROMPT, max_tokens=24, top_logprobs=2, **SAMPLED)
    whole = run(engine_of(name, dtype), [wanted])[0]["s"]
    source, destination = engine_of(name, dtype), engine_of(name, dtype)
    before = stopped_after(source, wanted, 9)
    destination.warm_decode()

    staged = shipped(source.export_kv(SessionId("s")), destination)
    generated = [out.token_id for out in before]
    after = run(destination, [replace(wanted, generated_token_ids=generated, staged=staged)])[0]["s"]

    assert numbers(before + after) == numbers(whole)
    assert destination.stats().prefill_token_count == 0
    assert destination.stats().replay_token_count == 0
    assert destination.stats().kv_tokens == 0


def test_what_the_source_made_meanwhile_is_replayed(engine_of) -> None:
    wanted = request(prompt=PROMPT, max_tokens=24, **SAMPLED)
    whole = run(engine_of(), [wanted])[0]["s"]
    source, destination = engine_of(), engine_of()
    before = stopped_after(source, wanted, 4)
    reader = source.export_kv(SessionId("s"))
    before += [out for _ in range(5) for out in source.step() if isinstance(out, TokenOut)]

    staged = shipped(reader, destination)
    generated = [out.token_id for out in before]
    after = run(destination, [replace(wanted, generated_token_ids=generated, staged=staged)])[0]["s"]

    assert numbers(before + after) == numbers(whole)
    assert destination.stats().replay_token_count == 5


@pytest.mark.parametrize("tokens", [20, 32, 44, 45])
def test_a_prompt_that_came_in_part_goes_on_where_a_chunk_begins(engine_of, tokens: int) -> None:
    wanted = request(prompt=PROMPT, max_tokens=8, top_logprobs=1)
    whole = run(engine_of(), [wanted])[0]["s"]
    source, destination = engine_of(), engine_of()
    stopped_after(source, wanted, 1)

    staged = shipped(source.export_kv(SessionId("s")), destination, tokens)
    after = run(destination, [replace(wanted, staged=staged)])[0]["s"]

    assert numbers(after) == numbers(whole)
    assert destination.stats().prefill_token_count == len(PROMPT) - (0 if tokens < 32 else 32)


def test_shipped_keys_and_values_enter_a_mixed_batch(engine_of) -> None:
    wanted = request(prompt=PROMPT, max_tokens=24, **SAMPLED)
    others = [
        request(f"o{n}", prompt=range(5, 30 + n), max_tokens=30, seed=n, temperature=1.0) for n in range(2)
    ]
    whole = run(engine_of(), [wanted])[0]["s"]
    source, destination = engine_of(), engine_of()
    before = stopped_after(source, wanted, 9)
    for other in others:
        stopped_after(destination, other, 3)

    staged = shipped(source.export_kv(SessionId("s")), destination)
    generated = [out.token_id for out in before]
    after = run(destination, [replace(wanted, generated_token_ids=generated, staged=staged)])[0]["s"]

    assert numbers(before + after) == numbers(whole)


def test_a_store_that_moves_while_it_is_read_gives_nothing_away() -> None:
    budget = KvBudget(4 * 512, slots=1)
    kv = SessionKv(budget)
    kv.reserve(10)
    kv.write(0, 0, torch.ones(2, 2, 10, 8))
    reader = KvReader(kv, layout(), range(10))
    assert len(reader.read(0, 10)) == 10 * reader.layout.token_bytes

    kv.reserve(600)

    with pytest.raises(KvUnavailable, match="moved"):
        reader.read(0, 10)


def test_a_store_of_its_own_can_be_read_on_while_it_grows() -> None:
    kv = SessionKv(KvBudget(4096))
    kv.reserve(10)
    kv.write(0, 0, torch.ones(2, 2, 10, 8))
    reader = KvReader(kv, layout(), range(10))
    before = reader.read(0, 10)

    kv.reserve(600)
    kv.release()

    assert reader.read(0, 10) == before


def layout() -> KvLayout:
    return KvLayout(
        revision="r", engine="e", cache=ALL_TOKENS, dtype="float32", layers=1, kv_heads=2, head_dim=8
    )


def test_a_store_of_another_shape_than_the_models_is_not_shipped() -> None:
    kv = SessionKv(KvBudget(1024))
    kv.reserve(4)
    kv.write(0, 0, torch.ones(2, 3, 4, 8))

    with pytest.raises(KvUnavailable, match="3 heads of 8"):
        KvReader(kv, layout(), range(4))


def test_room_for_what_is_on_its_way_is_counted_and_refused_beyond_the_budget(engine_of) -> None:
    engine = engine_of(max_context_tokens=128, max_kv_tokens=512, max_batch=1)
    first, second = engine.stage_kv(), engine.stage_kv()
    first.extend(200)

    with pytest.raises(CapacityError, match="no room for 400"):
        second.extend(400)

    first.release()
    second.extend(400)
    second.release()
    assert engine.stats().kv_tokens == 0


def test_a_session_that_waits_with_its_keys_and_values_gives_their_room_to_one_that_runs(engine_of) -> None:
    limits = {"max_context_tokens": 256, "max_kv_tokens": 384, "max_batch": 1}
    first, second = request("a", prompt=PROMPT, max_tokens=200), request("b", prompt=PROMPT, max_tokens=8)
    wanted = run(engine_of(), [first])[0]["a"], run(engine_of(), [second])[0]["b"]
    source, destination = engine_of(), engine_of(**limits)
    stopped_after(source, second, 1)
    stopped_after(destination, first, 1)

    staged = destination.stage_kv()
    reader = source.export_kv(SessionId("b"))
    staged.extend(200)
    staged.write(reader.read(0, 45), 45)
    tokens, _ = run(destination, [replace(second, staged=staged)])

    assert numbers(tokens["b"]) == numbers(wanted[1])
    assert numbers(tokens["a"]) == numbers(wanted[0][1:])
    assert destination.stats().kv_tokens == 0


@pytest.mark.parametrize("damage", ["flipped", "short", "late", "long"])
def test_a_piece_that_is_not_the_one_that_was_sent_is_refused(damage: str) -> None:
    piece = sealed(4, [1, 2], bytes(2 * layout().token_bytes))
    if damage == "flipped":
        piece.data = b"\1" + piece.data[1:]
    elif damage == "short":
        piece.data = piece.data[1:]

    with pytest.raises(KvDamaged):
        opened(piece, layout(), at=5 if damage == "late" else 4, end=5 if damage == "long" else 9)


def test_engines_whose_keys_and_values_lie_differently_name_the_difference() -> None:
    with pytest.raises(KvUnavailable, match="dtype is 'bfloat16' there, 'float32' here"):
        layout().check_equal(replace(layout(), dtype="bfloat16"))
    with pytest.raises(KvUnavailable, match="revision is 'q' there"):
        layout().check_equal(replace(layout(), revision="q"))
    with pytest.raises(KvUnavailable, match="float8"):
        replace(layout(), dtype="float8").check_sendable()
