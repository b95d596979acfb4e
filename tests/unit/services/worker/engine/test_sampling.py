from __future__ import annotations

import numpy as np
import pytest

from services.worker.engine import sampling
from services.worker.engine.protocol import Sampling
from services.worker.engine.sampling import (
    LogitsNotFinite,
    TokenChooser,
    exponential_noise,
    largest_ids,
    log_probabilities,
)
from stoker.errors import InvalidRequest

VOCAB = 700
RNG = np.random.default_rng(7)
LOGITS = (RNG.standard_normal(VOCAB) * 2).astype(np.float32)


def chooser(prompt=(), generated=(), **sampling) -> TokenChooser:
    return TokenChooser(Sampling(**sampling), prompt, generated, VOCAB)


def frequencies(logits: np.ndarray, draws: int = 4_000, **sampling) -> np.ndarray:
    choose = TokenChooser(Sampling(seed=5, **sampling), [], [], logits.size).choose
    return np.bincount([choose(logits, i) for i in range(draws)], minlength=logits.size) / draws


def expected(logits: np.ndarray, temperature: float) -> np.ndarray:
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


def assert_distribution(seen: np.ndarray, wanted: np.ndarray, draws: int = 4_000) -> None:
    deviation = np.abs(seen - wanted)
    five_sigma = 5 * np.sqrt(wanted * (1 - wanted) / draws)

    assert (deviation <= five_sigma + 1e-3 * (wanted > 0)).all()
    assert (seen[wanted == 0] == 0).all()


def test_greedy_is_the_lowest_id_among_the_largest_logits() -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[[400, 30, 31]] = 3.0

    assert chooser().choose(logits, 0) == 30


@pytest.mark.parametrize("vocab", [3, 256, 700])
def test_sampled_frequencies_follow_the_softmax(vocab: int) -> None:
    logits = LOGITS[:vocab]

    assert_distribution(frequencies(logits, temperature=0.7), expected(logits, 0.7))


def test_top_k_keeps_the_k_most_likely_renormalised() -> None:
    wanted = expected(LOGITS, 1.0)
    wanted[np.argsort(-wanted)[5:]] = 0

    assert_distribution(frequencies(LOGITS, temperature=1.0, top_k=5), wanted / wanted.sum())


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_likely_set_that_reaches_it(top_p: float) -> None:
    wanted = expected(LOGITS.astype(np.float64), 1.0)
    order = np.argsort(-wanted)
    size = int(np.searchsorted(np.cumsum(wanted[order]), top_p)) + 1
    wanted[order[size:]] = 0

    assert_distribution(frequencies(LOGITS, temperature=1.0, top_p=top_p), wanted / wanted.sum())


@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.99, 0.999999])
@pytest.mark.parametrize("kind", ["flat", "peaked", "equal", "some equal", "vanishing"])
def test_the_nucleus_of_many_tokens_is_the_shortest_head_of_a_full_sort(kind: str, top_p: float) -> None:
    noise = np.random.default_rng(5).standard_normal(5000).astype(np.float32)
    logits = {
        "flat": noise * 0.1,
        "peaked": noise * 6,
        "equal": noise * 0,
        "some equal": np.round(noise * 2),
        "vanishing": noise * 60,
    }[kind]
    weights = np.exp(logits - logits.max())
    order = np.argsort(-weights, kind="stable")
    reached = np.cumsum(weights[order], dtype=np.float64)
    total = float(weights.sum(dtype=np.float64))

    kept = np.flatnonzero(sampling._nucleus(weights, top_p, total))

    assert sorted(order[: len(kept)]) == list(kept)
    assert reached[len(kept) - 1] >= top_p * total * (1 - 1e-9)
    assert len(kept) == 1 or reached[len(kept) - 2] < top_p * total * (1 + 1e-9)


def test_top_p_applies_to_what_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))

    seen = frequencies(logits, temperature=1.0, top_k=2, top_p=0.5)

    assert seen[0] == 1  # 0.4 / 0.7 reaches 0.5 alone


def test_min_p_is_relative_to_the_most_likely() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))

    seen = frequencies(logits, temperature=1.0, min_p=0.4)

    assert_distribution(seen, np.array([0.625, 0.375, 0, 0]))


def test_the_same_seed_and_position_give_the_same_token_whatever_came_before() -> None:
    fresh = [chooser(temperature=1.0, seed=9).choose(LOGITS, i) for i in range(50)]
    one = chooser(temperature=1.0, seed=9)

    assert [one.choose(LOGITS, i) for i in reversed(range(50))] == fresh[::-1]


def test_different_seeds_and_positions_give_independent_noise() -> None:
    by_position = [exponential_noise(1, i, VOCAB) for i in range(40)]
    by_seed = [exponential_noise(i, 1, VOCAB) for i in range(2, 42)]

    correlations = np.corrcoef(np.exp(-np.array(by_position + by_seed)))  # uniform: no heavy tails

    assert np.abs(correlations - np.eye(80)).max() < 0.3


def test_noise_is_the_same_on_every_machine() -> None:
    """The bits come from Philox4x64, whose stream numpy guarantees: these are its first ones."""
    noise = exponential_noise(2**64 - 1, 3, VOCAB)

    assert noise.size == 3 + 256
    assert noise[:3].tolist() == pytest.approx(NOISE_OF_LARGEST_SEED, rel=1e-12)


NOISE_OF_LARGEST_SEED = [0.5328773253011844, 1.260009504470626, 1.3849205316330073]


def test_seeds_are_taken_modulo_64_bits() -> None:
    assert (exponential_noise(2**64 + 5, 0, VOCAB) == exponential_noise(5, 0, VOCAB)).all()
    assert (exponential_noise(-1, 0, VOCAB) == exponential_noise(2**64 - 1, 0, VOCAB)).all()


def test_repetition_penalty_covers_prompt_and_output() -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[[1, 2, 3]] = [3.0, 2.9, 2.8]

    assert chooser(prompt=[1], generated=[2], repetition_penalty=1.5).choose(logits, 1) == 3


def test_repetition_penalty_makes_negative_logits_more_negative() -> None:
    logits = np.full(VOCAB, -9.0, dtype=np.float32)
    logits[[1, 2]] = [-1.0, -1.5]

    assert chooser(prompt=[1], repetition_penalty=2.0).choose(logits, 0) == 2


def test_frequency_penalty_counts_and_presence_penalty_does_not() -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[[1, 2]] = [2.0, 1.2]
    frequency = chooser(generated=[1, 1], frequency_penalty=0.5)
    presence = chooser(generated=[1, 1], presence_penalty=0.5)

    assert frequency.choose(logits, 2) == 2
    assert presence.choose(logits, 2) == 1


def test_penalties_of_a_resumed_session_equal_those_of_one_that_saw_its_tokens() -> None:
    resumed = chooser(prompt=[5], generated=[7, 8, 7], frequency_penalty=0.3, repetition_penalty=1.2)
    observing = chooser(prompt=[5], frequency_penalty=0.3, repetition_penalty=1.2)
    for token in (7, 8, 7):
        observing.observe(token)

    assert resumed.choose(LOGITS, 3) == observing.choose(LOGITS, 3)
    assert (resumed._process(LOGITS, 3) == observing._process(LOGITS, 3)).all()


def test_logit_bias_moves_the_choice() -> None:
    assert chooser(logit_bias={11: 100.0}).choose(LOGITS, 0) == 11
    assert chooser(logit_bias={int(LOGITS.argmax()): -100.0}).choose(LOGITS, 0) != LOGITS.argmax()


def test_stop_tokens_are_not_chosen_before_min_tokens() -> None:
    best = int(LOGITS.argmax())
    choose = chooser(stop_token_ids=frozenset({best}), min_tokens=2).choose

    assert choose(LOGITS, 1) != best
    assert choose(LOGITS, 2) == best


def test_log_probabilities_are_of_the_raw_distribution() -> None:
    wanted = np.log(expected(LOGITS.astype(np.float64), 1.0))
    order = np.argsort(-wanted)[:4]

    logprob, top = log_probabilities(LOGITS, 17, 4)

    assert logprob == pytest.approx(wanted[17], abs=1e-5)
    assert [t.token_id for t in top] == order.tolist()
    assert [t.logprob for t in top] == pytest.approx(wanted[order].tolist(), abs=1e-5)


@pytest.mark.parametrize("count", [1, 5, 699, 700])
@pytest.mark.parametrize("size", [700, 5000])
def test_largest_ids_are_those_of_a_full_sort(count: int, size: int) -> None:
    logits = np.round(np.random.default_rng(count).standard_normal(size), 1).astype(np.float32)
    threshold = np.sort(logits)[-count]

    assert largest_ids(logits, count).tolist() == np.flatnonzero(logits >= threshold).tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    broken = LOGITS.copy()
    broken[3] = value

    with pytest.raises(LogitsNotFinite, match="position 6"):
        chooser().choose(broken, 6)


def test_logits_are_not_changed() -> None:
    before = LOGITS.copy()

    chooser(prompt=[1], generated=[2], temperature=1.0, repetition_penalty=2.0, logit_bias={3: 1.0}).choose(
        LOGITS, 0
    )

    assert (before == LOGITS).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {1: float("inf")}),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("top_logprobs", 21),
    ],
)
def test_out_of_range_sampling_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Sampling(**{name: value})

    assert caught.value.param == name
