"""What is asked of a simulated cluster: requests, from arrival processes with a seed or files (`traces`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from stoker.ids import ModelName


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when it comes (seconds from the start), for which model, and its length in tokens."""

    arrival_seconds: float
    model: ModelName
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Prompt and answer lengths to draw from, pair by pair."""

    input_tokens: np.ndarray
    output_tokens: np.ndarray

    @classmethod
    def constant(cls, input_tokens: int, output_tokens: int) -> Self:
        """Return lengths that are always the same."""
        return cls(input_tokens=np.array([input_tokens]), output_tokens=np.array([output_tokens]))

    def sample(self, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return `count` pairs, drawn with replacement."""
        chosen = generator.integers(len(self.input_tokens), size=count)
        return self.input_tokens[chosen], self.output_tokens[chosen]


def gamma_requests(  # noqa: PLR0913 - a workload's parameters, each named by its caller
    models: Sequence[ModelName],
    *,
    requests_per_second: float,
    seconds: float,
    cv: float,
    lengths: Lengths,
    seed: int,
    popularity: Sequence[float] | None = None,
) -> list[Request]:
    """Return Gamma arrivals: one process per model, rescaled to the rate that was asked for.

    One process per model is drawn for the whole trace and then stretched to its length: drawing afresh in
    every window would add (cv² - 1) / 2 requests per window. It is entered at a random moment of the whole
    trace, going round: processes that all begin with an arrival begin with a burst of every model at once,
    because at a high cv almost every gap is tiny, and nothing else would then be measured.

    Args:
        models: Who is asked.
        requests_per_second: Over all models.
        seconds: Length of the trace.
        cv: Coefficient of variation of each model's inter-arrival times; 1 is Poisson.
        lengths: To draw prompt and answer lengths from.
        seed: The same seed gives the same trace.
        popularity: Share of each model, any scale; None = equal.
    """
    generator = np.random.default_rng(seed)
    shares = np.array(popularity if popularity is not None else np.ones(len(models)), dtype=float)
    counts = generator.multinomial(round(requests_per_second * seconds), shares / shares.sum())
    arrivals: list[tuple[float, int]] = []
    for index, count in enumerate(counts):
        if count == 0:
            continue
        gaps = generator.gamma(1 / cv**2, cv**2, size=int(count))
        ends = np.cumsum(gaps) * (seconds / max(gaps.sum(), 1e-9))
        times = (ends + generator.uniform(0.0, seconds)) % seconds
        arrivals += [(float(at), index) for at in times]
    arrivals.sort()
    prompts, answers = lengths.sample(len(arrivals), generator)
    return [
        Request(at, models[index], int(prompt), int(answer))
        for (at, index), prompt, answer in zip(arrivals, prompts, answers, strict=True)
    ]


def realised(requests: Sequence[Request]) -> tuple[float, float]:
    """Return a trace's requests per second and the coefficient of variation of its inter-arrival times."""
    times = np.array([request.arrival_seconds for request in requests])
    if len(times) < 3 or times[-1] <= times[0]:  # noqa: PLR2004 - two gaps at least make a variation
        return 0.0, 0.0
    gaps = np.diff(times)
    return (len(times) - 1) / (times[-1] - times[0]), float(gaps.std() / gaps.mean())
