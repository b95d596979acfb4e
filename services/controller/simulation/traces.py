"""Traces from files: requests, lengths, invocations per minute; what is no such file is refused by line."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from services.controller.simulation.workload import Lengths, Request
from stoker.errors import InvalidRequest
from stoker.ids import ModelName

_COLUMNS = ("arrival_s", "input_tokens", "output_tokens")
_SECONDS_PER_MINUTE = 60.0
_NAMED = 3
"""Columns named in a message; the rest are counted."""
_MOST = 10_000_000
"""Tokens, or invocations in a minute: more is a mistake, and would be simulated for ever."""
_LAST_SECONDS = 31_536_000.0
"""A year."""


def read_lengths(path: Path, *, context_tokens: int) -> Lengths:
    """Return the lengths in a CSV with `input_tokens` and `output_tokens`, cut to what a model can take.

    Args:
        path: The file, `.gz` or not.
        context_tokens: Prompt and answer together; a longer prompt keeps half, the answer gets the rest.

    Raises:
        InvalidRequest: The file is no such CSV, or is empty.
    """
    prompts, answers = [], []
    for line, row in _rows(path, _COLUMNS[1:]):
        prompt = min(_count(path, line, row, "input_tokens"), context_tokens // 2)
        prompts.append(max(1, prompt))
        answers.append(max(1, min(_count(path, line, row, "output_tokens"), context_tokens - prompt)))
    if not prompts:
        raise InvalidRequest(f"{path} has a header line and no lengths after it")
    return Lengths(input_tokens=np.array(prompts), output_tokens=np.array(answers))


def read_requests(path: Path, models: Sequence[ModelName], *, limit: int | None = None) -> list[Request]:
    """Return the requests of a CSV: `arrival_s, input_tokens, output_tokens` and, if it has one, `model`.

    Without a model column requests go to the models in turn (striping: no model gets more than its share). An
    answer of no tokens counts as one.

    Raises:
        InvalidRequest: The file is no such CSV, is empty, has a time that is not within a year, or names a
            model that is not simulated.
    """
    known = set(models)
    requests = []
    for number, (line, row) in enumerate(_rows(path, _COLUMNS)):
        if limit is not None and number >= limit:
            break
        name = ModelName(row["model"]) if "model" in row else models[number % len(models)]
        if name not in known:
            raise InvalidRequest(f"{path} line {line}: model {name!r} is not among the simulated ones")
        prompt = max(1, _count(path, line, row, "input_tokens"))
        answer = max(1, _count(path, line, row, "output_tokens"))
        requests.append(Request(_moment(path, line, row), name, prompt, answer))
    if not requests:
        raise InvalidRequest(f"{path} has a header line and no requests after it")
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
        InvalidRequest: The file has no such columns, no such counts, or none in these minutes.
    """
    generator = np.random.default_rng(seed)
    arrivals: list[tuple[float, int]] = []
    columns = [f"m{minute}" for minute in minutes]
    counts = [
        [_count(path, line, row, column) for column in columns]
        for line, row in _rows(path, ("func", *columns))
    ]
    total = sum(map(sum, counts))
    if not total:
        raise InvalidRequest(f"{path} has no invocation in minutes {minutes[0]} to {minutes[-1]}")
    share = min(1.0, requests_per_second * len(columns) * _SECONDS_PER_MINUTE / total)
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


def _moment(path: Path, line: int, row: Mapping[str, str]) -> float:
    try:
        seconds = float(row["arrival_s"])
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds <= _LAST_SECONDS:
        raise InvalidRequest(
            f"{path} line {line}: arrival_s is {row['arrival_s']!r}, no number of seconds from 0 to "
            f"{_LAST_SECONDS:,.0f}, a year: count from the trace's begin"
        )
    return seconds


def _count(path: Path, line: int, row: Mapping[str, str], column: str) -> int:
    try:
        count = int(row[column])
    except (TypeError, ValueError):
        count = -1
    if not 0 <= count <= _MOST:
        raise InvalidRequest(
            f"{path} line {line}: {column} is {row[column]!r}, no number from 0 to {_MOST:,}"
        )
    return count


def _rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield a CSV's rows with their lines; the header is line 1."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            reader = csv.DictReader(cast("Iterable[str]", file))
            missing = [column for column in needed if column not in (reader.fieldnames or ())]
            if missing:
                more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
                columns = ", ".join(missing[:_NAMED])
                raise InvalidRequest(f"{path} has no column {columns}{more}; it needs a header line")
            for row in reader:
                yield reader.line_num, row
    except (OSError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidRequest(f"trace {path} cannot be read: {reason}") from error
    except (UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise InvalidRequest(f"trace {path} is no CSV: {error}") from error
