"""What is asked of a simulated cluster: requests from trace files, or from arrival processes with a seed."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import numpy as np

from stoker.errors import InvalidRequest
from stoker.ids import ModelName

_COLUMNS = ("arrival_s", "input_tokens", "output_tokens")
_SECONDS_PER_MINUTE = 60.0


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


def read_lengths(path: Path, *, context_tokens: int) -> Lengths:
    """Return the lengths in a CSV with `input_tokens` and `output_tokens`, cut to what a model can take.

    Args:
        path: The file, `.gz` or not.
        context_tokens: Prompt and answer together; a longer prompt keeps half, the answer gets the rest.

    Raises:
        InvalidRequest: The file is no such CSV.
    """
    prompts, answers = [], []
    for row in _rows(path, _COLUMNS[1:]):
        prompt = min(int(row["input_tokens"]), context_tokens // 2)
        prompts.append(max(1, prompt))
        answers.append(max(1, min(int(row["output_tokens"]), context_tokens - prompt)))
    return Lengths(input_tokens=np.array(prompts), output_tokens=np.array(answers))


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


def read_requests(path: Path, models: Sequence[ModelName], *, limit: int | None = None) -> list[Request]:
    """Return the requests of a CSV: `arrival_s, input_tokens, output_tokens` and, if it has one, `model`.

    Without a model column requests go to the models in turn (striping: no model gets more than its share).

    Raises:
        InvalidRequest: The file is no such CSV, or names a model that is not simulated.
    """
    known = set(models)
    requests = []
    for number, row in enumerate(_rows(path, _COLUMNS)):
        if limit is not None and number >= limit:
            break
        name = ModelName(row["model"]) if "model" in row else models[number % len(models)]
        if name not in known:
            raise InvalidRequest(f"{path} line {number + 2}: model {name!r} is not among the simulated ones")
        try:
            lengths = int(row["input_tokens"]), int(row["output_tokens"])
            requests.append(Request(float(row["arrival_s"]), name, *lengths))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{path} line {number + 2} has no number where one belongs") from error
    requests.sort(key=lambda request: request.arrival_seconds)
    return requests


def read_invocations(  # noqa: PLR0913 - a trace's parameters, each named by its caller
    path: Path,
    models: Sequence[ModelName],
    lengths: Lengths,
    *,
    minutes: range,
    requests_per_second: float,
    seed: int,
) -> list[Request]:
    """Return requests from a CSV of counts per function and minute (Azure Functions 2019): `func`, `m1`, ...

    Functions are dealt to models in turn by popularity (striping: the top model gets about a tenth of all;
    contiguous blocks would give it most). Within its minute an invocation comes at a random moment.

    Args:
        path: The file.
        models: Who is asked.
        lengths: To draw prompt and answer lengths from.
        minutes: Which minutes of the day, from 1.
        requests_per_second: The invocations are thinned out to about this rate, never multiplied.
        seed: Of the draws.

    Raises:
        InvalidRequest: The file has no such columns.
    """
    generator = np.random.default_rng(seed)
    arrivals: list[tuple[float, int]] = []
    columns = [f"m{minute}" for minute in minutes]
    counts = [[int(row[column]) for column in columns] for row in _rows(path, ("func", *columns))]
    total = sum(map(sum, counts))
    share = min(1.0, requests_per_second * len(columns) * _SECONDS_PER_MINUTE / max(1, total))
    for number, per_minute in enumerate(counts):
        for position, invoked in enumerate(per_minute):
            offsets = generator.uniform(size=generator.binomial(invoked, share))
            arrivals += [
                ((position + float(offset)) * _SECONDS_PER_MINUTE, number % len(models)) for offset in offsets
            ]
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


def _rows(path: Path, needed: Iterable[str]) -> Iterator[dict[str, str]]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            reader = csv.DictReader(cast("Iterable[str]", file))
            missing = [column for column in needed if column not in (reader.fieldnames or ())]
            if missing:
                raise InvalidRequest(f"{path} has no column {', '.join(missing)}; it needs a header line")
            yield from reader
    except OSError as error:
        raise InvalidRequest(f"trace {path} cannot be read: {error.strerror or error}") from error
