"""Arrival processes: what becomes of them."""

from __future__ import annotations

import numpy as np
import pytest

from services.controller.simulation.workload import Lengths, gamma_requests, realised
from stoker.ids import ModelName

MODELS = [ModelName("a"), ModelName("b"), ModelName("c")]
FEW_TOKENS = Lengths.constant(10, 20)


def test_gamma_arrivals_have_the_rate_and_the_variation_that_was_asked_for() -> None:
    requests = gamma_requests(
        MODELS[:1], requests_per_second=2.0, seconds=20_000, cv=4.0, lengths=FEW_TOKENS, seed=5
    )

    rate, cv = realised(requests)

    assert rate == pytest.approx(2.0, rel=0.01)
    assert cv == pytest.approx(4.0, rel=0.1)


def test_the_same_seed_gives_the_same_requests_and_another_seed_others() -> None:
    first, second, third = (
        gamma_requests(MODELS, requests_per_second=1.0, seconds=100, cv=2.0, lengths=FEW_TOKENS, seed=seed)
        for seed in (1, 1, 2)
    )

    assert first == second
    assert first != third


def test_popularity_decides_who_is_asked() -> None:
    requests = gamma_requests(
        MODELS,
        requests_per_second=10.0,
        seconds=1000,
        cv=1.0,
        lengths=FEW_TOKENS,
        seed=1,
        popularity=[8, 2, 0],
    )

    share = np.mean([request.model == "a" for request in requests])

    assert share == pytest.approx(0.8, abs=0.02)
    assert not any(request.model == "c" for request in requests)
