"""Position-keyed sampling: which token follows, given one row of logits.

Theory of operation. A row is processed alone, in numpy on the CPU in a fixed order of operations, so its
result cannot depend on the batch or on the device. The order:

1. Log probabilities, where asked for, come from the raw logits: the model's own distribution, as OpenAI and
   vLLM report it, before anything below.
2. Repetition penalty (prompt and output), frequency and presence penalty (output), logit bias; stop tokens
   are forbidden before `min_tokens`.
3. Temperature 0: the arg max, lowest token id among equals. Done.
4. Temperature; then `top_k`; then `top_p` of what `top_k` left, renormalised; then `min_p` relative to the
   most likely token. `top_k` keeps all equals of its last token; `top_p` takes equals by lower token id.
5. The draw, with noise that depends only on `(seed, output position)`.

The draw is Gumbel-max in its exponential form (arg min of Exp(1) / weight), in two levels: first a block of
256 consecutive token ids by the sum of its weights, then a token in that block. The distribution is exactly
that of one level, but a vocabulary of 49152 needs 448 random numbers instead of 49152 (33 µs instead of
400 µs). They are the output of Philox4x64 (Salmon et al., SC11) with the seed as key and the position in the
counter: numpy guarantees the stream of its bit generators, so the bits are the same everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from services.worker.engine.protocol import TokenLogprob
from stoker.errors import StokerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from services.worker.engine.protocol import Sampling

Floats: TypeAlias = "NDArray[np.float32]"
Ids: TypeAlias = "NDArray[np.int64]"

BLOCK_BITS = 8
BLOCK_TOKENS = 1 << BLOCK_BITS
MAXIMA = 1024
"""Groups of logits whose maxima bound the k-th largest logit from below, for k up to this."""
RUN_TOKENS = 64
"""Weights, in falling order, that are added up before `top_p` looks which run it ends in."""


class LogitsNotFinite(StokerError):
    """The model gave NaN or infinity: its weights or its arithmetic are broken for this input."""

    code = "engine_failed"


class TokenChooser:
    """Chooses one session's tokens, keeping count of its past ones.

    Args:
        sampling: How to choose.
        prompt_token_ids: For the repetition penalty.
        generated_token_ids: Output tokens so far.
        vocab_size: Length of a row of logits.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_token_ids: Sequence[int],
        generated_token_ids: Sequence[int],
        vocab_size: int,
    ) -> None:
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._counts: NDArray[np.int32] | None = None
        self._seen: NDArray[np.bool_] | None = None
        if sampling.has_penalties:
            self._counts = np.bincount(
                np.asarray(generated_token_ids, dtype=np.int64), minlength=vocab_size
            ).astype(np.int32)
            self._seen = self._counts > 0
            self._seen[np.asarray(prompt_token_ids, dtype=np.int64)] = True
        self._bias_ids = np.array([i for i in sampling.logit_bias if i < vocab_size], dtype=np.int64)
        self._bias = np.array(
            [bias for i, bias in sampling.logit_bias.items() if i < vocab_size], dtype=np.float32
        )
        self._stop_ids = np.array(
            sorted(i for i in sampling.stop_token_ids if i < vocab_size), dtype=np.int64
        )

    def observe(self, token_id: int) -> None:
        """Count a token as output: one just chosen, or one that is being replayed."""
        if self._counts is not None and self._seen is not None:
            self._counts[token_id] += 1
            self._seen[token_id] = True

    def choose(self, logits: Floats, position: int) -> int:
        """Return the token id for output position `position`.

        Args:
            logits: Raw, shape [vocabulary]; not changed.
            position: Output position, from 0: the noise's counter.

        Raises:
            LogitsNotFinite: The largest logit is NaN or infinite.
        """
        processed = self._process(logits, position)
        best = int(processed.argmax())
        if not np.isfinite(processed[best]):
            raise LogitsNotFinite(
                f"the model's logits at output position {position} have {processed[best]} as their maximum; "
                "check the checkpoint's weights and dtype"
            )
        if self._sampling.temperature == 0:
            return best
        return self._draw(processed, float(processed[best]), position)

    def _process(self, logits: Floats, position: int) -> Floats:
        """Apply penalties, bias and `min_tokens`; return `logits` itself where none applies."""
        sampling = self._sampling
        forbids_stop = position < sampling.min_tokens and self._stop_ids.size > 0
        if not (sampling.has_penalties or self._bias_ids.size or forbids_stop):
            return logits
        out = logits.copy()
        if self._counts is not None and self._seen is not None:
            _penalise(out, sampling, self._counts, self._seen)
        out[self._bias_ids] += self._bias
        if forbids_stop:
            out[self._stop_ids] = -np.inf
        return out

    def _draw(self, logits: Floats, largest: float, position: int) -> int:
        """Draw from the filtered distribution of `logits`."""
        sampling = self._sampling
        noise = exponential_noise(sampling.seed, position, self._vocab_size)
        if not 0 < sampling.top_k < logits.size:
            weights = _weights(logits, largest, sampling.temperature)
            if sampling.top_p < 1:
                weights[~_nucleus(weights, sampling.top_p, float(weights.sum(dtype=np.float64)))] = 0
            if sampling.min_p > 0:
                weights[weights < np.float32(sampling.min_p)] = 0
            return _draw_dense(weights, noise)
        kept = largest_ids(logits, sampling.top_k)
        weights = _weights(logits[kept], largest, sampling.temperature)
        if sampling.top_p < 1:
            inside = _nucleus(weights, sampling.top_p, float(weights.sum(dtype=np.float64)))
            kept, weights = kept[inside], weights[inside]
        likely = weights >= np.float32(sampling.min_p)
        return _draw_sparse(kept[likely], weights[likely], noise, self._vocab_size)


def log_probabilities(logits: Floats, token_id: int, top: int) -> tuple[float, tuple[TokenLogprob, ...]]:
    """Return the log probability of `token_id` and the `top` most likely tokens of the raw distribution."""
    largest = logits.max()
    log_total = largest + np.log(np.exp(logits - largest).sum(dtype=np.float64))
    if top == 0:
        return float(logits[token_id] - log_total), ()
    candidates = largest_ids(logits, min(top, logits.size))
    order = np.argsort(-logits[candidates], kind="stable")[:top]
    best = tuple(
        TokenLogprob(token_id=int(i), logprob=float(logits[i] - log_total)) for i in candidates[order]
    )
    return float(logits[token_id] - log_total), best


def exponential_noise(seed: int, position: int, vocab_size: int) -> NDArray[np.float64]:
    """Return Exp(1) noise: one value per block of token ids, then one per place in a block."""
    blocks = -(-vocab_size // BLOCK_TOKENS)
    generator = np.random.Philox(
        key=np.array([seed % 2**64, 0], dtype=np.uint64),
        counter=np.array([0, position, 0, 0], dtype=np.uint64),
    )
    bits = generator.random_raw(blocks + BLOCK_TOKENS)
    # 53 bits, centred in their cells: never 0 or 1, so the logarithm is finite and never 0.
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.asarray(-np.log(uniform))


def _penalise(out: Floats, sampling: Sampling, counts: NDArray[np.int32], seen: NDArray[np.bool_]) -> None:
    if sampling.repetition_penalty != 1:
        ids = np.flatnonzero(seen)
        values, penalty = out[ids], np.float32(sampling.repetition_penalty)
        out[ids] = np.where(values > 0, values / penalty, values * penalty)
    if sampling.frequency_penalty != 0 or sampling.presence_penalty != 0:
        ids = np.flatnonzero(counts)
        out[ids] -= counts[ids] * np.float32(sampling.frequency_penalty) + np.float32(
            sampling.presence_penalty
        )


def largest_ids(logits: Floats, count: int) -> Ids:
    """Return the ids of the `count` largest logits and of all equals of the last one, ascending."""
    bound = np.float32(-np.inf)
    rows = logits.size // MAXIMA
    if rows and count < MAXIMA:
        # Each maximum is a different logit, so `count` logits reach the count-th largest of the maxima.
        bound = np.partition(logits[: rows * MAXIMA].reshape(rows, MAXIMA).max(axis=0), -count)[-count]
    candidates = np.flatnonzero(logits >= bound)
    values = logits[candidates]
    return np.asarray(candidates[values >= np.partition(values, -count)[-count]])


def _weights(logits: Floats, largest: float, temperature: float) -> Floats:
    """Return the unnormalised probabilities; the largest logit's is 1."""
    weights = logits - np.float32(largest)
    weights /= np.float32(temperature)
    return np.asarray(np.exp(weights, out=weights))


def _nucleus(weights: Floats, top_p: float, total: float) -> NDArray[np.bool_]:
    """Return which are the fewest largest weights that reach `top_p * total`; lower places among equals."""
    target = top_p * total
    # All that is smaller adds up to half of what may be left out at most, so it need not be sorted.
    likely = weights[weights >= np.float32((total - target) / (2 * weights.size))]
    falling = np.sort(likely)[::-1]  # of floats only: vectorised, ten times as fast as an argsort
    whole_runs = falling[: falling.size - falling.size % RUN_TOKENS]
    reached = _reaching(whole_runs, target)
    if reached is None:  # the end is in the last run, which smaller weights belong to
        falling = np.sort(weights)[::-1]
        reached = _reaching(falling, target)
    count = falling.size if reached is None else reached
    smallest = falling[count - 1]
    kept = np.asarray(weights > smallest)
    kept[np.flatnonzero(weights == smallest)[: count - np.count_nonzero(kept)]] = True
    return kept


def _reaching(falling: Floats, target: float) -> int | None:
    """Return how many of the first weights add up to `target`; None: all of them don't."""
    if not falling.size:
        return None
    runs = np.cumsum(np.add.reduceat(falling, np.arange(0, falling.size, RUN_TOKENS), dtype=np.float64))
    run = int(np.searchsorted(runs, target))
    if run == runs.size:
        return None
    first = run * RUN_TOKENS
    reached = np.cumsum(falling[first : first + RUN_TOKENS], dtype=np.float64)
    before = float(runs[run - 1]) if run else 0.0
    return first + min(int(np.searchsorted(reached, target - before)), reached.size - 1) + 1


def _draw_dense(weights: Floats, noise: NDArray[np.float64]) -> int:
    starts = np.arange(0, weights.size, BLOCK_TOKENS)
    block = _first_arrival(noise[: starts.size], np.add.reduceat(weights, starts))
    first = block * BLOCK_TOKENS
    inside = weights[first : first + BLOCK_TOKENS]
    return first + _first_arrival(noise[starts.size : starts.size + inside.size], inside)


def _draw_sparse(ids: Ids, weights: Floats, noise: NDArray[np.float64], vocab_size: int) -> int:
    blocks = -(-vocab_size // BLOCK_TOKENS)
    block_of = ids >> BLOCK_BITS
    block = _first_arrival(noise[:blocks], _sums_by(block_of, weights, blocks))
    inside = block_of == block
    places = ids[inside] & (BLOCK_TOKENS - 1)
    return int(ids[inside][_first_arrival(noise[blocks + places], weights[inside])])


def _sums_by(group_of: Ids, weights: Floats, groups: int) -> NDArray[np.float64]:
    return np.bincount(group_of, weights=weights, minlength=groups).astype(np.float64, copy=False)


def _first_arrival(noise: NDArray[np.float64], rates: Floats | NDArray[np.float64]) -> int:
    """Return which of several Poisson processes arrives first: index i with probability rate i / sum."""
    with np.errstate(divide="ignore"):  # what was dropped never arrives
        return int((noise / rates).argmin())
