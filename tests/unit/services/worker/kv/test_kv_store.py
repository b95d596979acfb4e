from __future__ import annotations

import torch

from services.worker.kv.kv_store import BLOCK_TOKENS, SLOT_TOKENS, KvBudget, SessionKv

KV_HEADS, WIDTH = 2, 8


def kv(tokens: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((2, KV_HEADS, tokens, WIDTH), value)


def test_sessions_take_neighbouring_slots_and_give_them_back() -> None:
    budget = KvBudget(4 * SLOT_TOKENS, slots=2)
    sessions = [SessionKv(budget) for _ in range(3)]
    for session in sessions:
        session.reserve(10)

    assert [session.slot for session in sessions] == [0, 1, None]
    assert budget.used_tokens == 2 * SLOT_TOKENS + BLOCK_TOKENS
    for session in sessions:
        session.release()
    assert budget.used_tokens == 0


def test_a_slot_is_zero_again_for_its_next_session() -> None:
    budget = KvBudget(2 * SLOT_TOKENS, slots=1)
    first, second = SessionKv(budget), SessionKv(budget)
    first.reserve(10)
    first.write(0, 0, kv(10, float("nan")))
    first.release()

    second.reserve(1)
    second.write(0, 0, kv(1))

    assert second.slot == 0
    assert torch.equal(second.layer(0)[:, :, 1:], torch.zeros(2, KV_HEADS, SLOT_TOKENS - 1, WIDTH))


def test_a_session_that_outgrows_its_slot_takes_its_tokens_along() -> None:
    budget = KvBudget(4 * SLOT_TOKENS, slots=1)
    session = SessionKv(budget)
    session.reserve(SLOT_TOKENS)
    session.write(0, 0, kv(SLOT_TOKENS, 3.0))

    assert session.reserve(SLOT_TOKENS + 1)

    assert session.slot is None
    assert budget.pool.take() == 0
    assert torch.equal(session.layer(0)[:, :, :SLOT_TOKENS], kv(SLOT_TOKENS, 3.0))
    assert not session.layer(0)[:, :, SLOT_TOKENS:].any()


def test_the_pool_is_part_of_the_bound() -> None:
    budget = KvBudget(3 * SLOT_TOKENS, slots=1)
    long, longer = SessionKv(budget), SessionKv(budget)

    assert long.reserve(2 * SLOT_TOKENS)
    assert not longer.reserve(SLOT_TOKENS + 1)
    assert longer.reserve(SLOT_TOKENS)


def test_attention_finds_whole_blocks_where_the_budget_ends_inside_one() -> None:
    session = SessionKv(KvBudget(BLOCK_TOKENS + 5))
    session.reserve(BLOCK_TOKENS + 5)
    session.write(0, 0, kv(1))

    assert session.layer(0).shape[2] == 2 * BLOCK_TOKENS
    assert not session.reserve(BLOCK_TOKENS + 6)
