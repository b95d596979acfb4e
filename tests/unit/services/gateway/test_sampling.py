"""The client's word wins over the model's, the model's over the defaults."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.sampling import SamplingRequest, derive_seed, output_budget, resolve
from services.gateway.text.model_text import GenerationDefaults
from stoker.errors import ContextLengthExceeded

SEEDS = st.integers(-(2**63), 2**64 - 1)


def resolved(asked: SamplingRequest, defaults: GenerationDefaults | None = None, **changed: object) -> object:
    fields = {"model_stop_ids": (5, 3), "seed": 1, "max_tokens": 10} | changed
    return resolve(asked, defaults or GenerationDefaults(), **fields)


def test_the_client_wins_then_the_model_then_openais_defaults() -> None:
    model = GenerationDefaults(temperature=0.6, top_k=50)

    assert resolved(SamplingRequest()).temperature == 1.0
    assert resolved(SamplingRequest(), model).temperature == pytest.approx(0.6)
    assert resolved(SamplingRequest(temperature=0.0), model).temperature == 0.0
    assert resolved(SamplingRequest(), model).top_k == 50


def test_stop_tokens_are_the_models_and_the_clients() -> None:
    assert list(resolved(SamplingRequest(stop_token_ids=(9,))).stop_token_ids) == [3, 5, 9]


def test_ignoring_the_end_keeps_the_clients_own_stop_tokens() -> None:
    alone = resolved(SamplingRequest(ignore_eos=True))
    own = resolved(SamplingRequest(ignore_eos=True, stop_token_ids=(9,)))

    assert (list(alone.stop_token_ids), alone.ignore_eos) == ([], True)
    assert (list(own.stop_token_ids), own.ignore_eos) == ([9], False)


def test_log_probabilities_are_absent_unless_asked_for() -> None:
    assert not resolved(SamplingRequest()).HasField("top_logprobs")
    assert resolved(SamplingRequest(top_logprobs=0)).HasField("top_logprobs")


@given(SEEDS)
def test_the_first_choice_has_the_clients_seed(seed: int) -> None:
    assert derive_seed(seed, 0) == seed % 2**64


@given(SEEDS)
def test_choices_have_different_seeds(seed: int) -> None:
    seeds = [derive_seed(seed, choice) for choice in range(128)]

    assert len(set(seeds)) == 128
    assert all(0 <= derived < 2**64 for derived in seeds)


@pytest.mark.parametrize(
    ("prompt", "asked", "context", "budget"),
    [(10, None, 100, 90), (10, 90, 100, 90), (10, 5, 100, 5), (10, 5, 0, 5), (10, None, 0, None)],
)
def test_an_answer_may_fill_the_context(
    prompt: int, asked: int | None, context: int, budget: int | None
) -> None:
    assert output_budget(prompt, asked, context) == budget


@pytest.mark.parametrize(("prompt", "asked"), [(100, None), (10, 91), (200, 1)])
def test_what_does_not_fit_is_refused_in_openais_words(prompt: int, asked: int | None) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"maximum context length is 100 tokens\. However, you"):
        output_budget(prompt, asked, 100)
