"""The cells of the policies' table: models, and the requests that one seed makes of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.controller.simulation import scenario, traces, workload
from services.controller.simulation.hardware import PAPER_NODE, ModelSpec
from services.controller.simulation.workload import Request
from stoker.ids import ModelName

TRACES = Path(__file__).parent / "traces"
LENGTHS = {"GSM8K": "gsm8k_lengths_gpt2bpe.csv.gz", "ShareGPT": "sharegpt_lengths_llama2.csv.gz"}
AZURE_FUNCTIONS = TRACES / "azure_functions_2019_1350f_1day.csv.gz"
AZURE_LLM = {"code": "azure_llm_2023_code.csv.gz", "conv": "azure_llm_2023_conv.csv.gz"}
FIRST_MINUTES = (1, 601)
"""Of the day of Azure's functions: midnight, and ten in the morning."""
SIZES = ("opt-6.7b:32", "opt-13b:16", "opt-30b:8")
RATES = (0.2, 0.8, 1.4)
CVS = (1.0, 2.0, 4.0)
"""Swept beside the paper's 8, for the first size at `SWEPT_RATE` requests/s."""
SWEPT_RATE = 0.8
NODES = 4
CONTEXT_TOKENS = 2048
AZURE_EVERY = 10
"""Of the LLM traces' requests every tenth is kept: 2.4 and 5.4 requests/s are more than 16 A40 serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row of the table, for one seed.

    Attributes:
        models: As `stoker simulate --models` takes them.
        lengths: Key of `LENGTHS`; of Azure's LLM traces no more than a name, they have lengths of their own.
        rate: Requests per second over all models.
        cv: Coefficient of variation of a model's gaps; 0 = a recorded trace, `recorded`.
        seconds: Length of the trace.
        seed: Of everything drawn.
        recorded: Which recorded trace: "functions 1", "functions 601", "code" or "conv"; "" = Gamma arrivals.
    """

    models: str
    lengths: str
    rate: float
    cv: float
    seconds: float
    seed: int
    recorded: str = ""

    @property
    def row(self) -> str:
        """Return the name of its row, the same for every seed."""
        size = self.models.split(":")[0].removeprefix("opt-").upper()
        if self.recorded.startswith("functions"):
            return f"Azure functions from minute {self.recorded.split()[1]}, {self.rate:g}/s"
        if self.recorded:
            return f"Azure LLM {self.recorded}, 1 in {AZURE_EVERY}"
        return f"{size} {self.lengths} {self.rate:g}/s CV {self.cv:g}"

    def specs(self) -> list[ModelSpec]:
        """Return what is served."""
        return scenario.parse_models(self.models)

    def requests(self) -> list[Request]:
        """Return what is asked, in order of arrival."""
        names = [model.name for model in self.specs()]
        if self.recorded in AZURE_LLM:
            return _recorded_requests(TRACES / AZURE_LLM[self.recorded], names, self)
        drawn = traces.read_lengths(TRACES / LENGTHS[self.lengths], context_tokens=CONTEXT_TOKENS)
        if self.recorded:
            first = int(self.recorded.split()[1])
            return traces.read_invocations(
                AZURE_FUNCTIONS,
                names,
                drawn,
                minutes=range(first, first + max(1, round(self.seconds / 60))),
                requests_per_second=self.rate,
                seed=self.seed,
            )
        return workload.gamma_requests(
            names,
            requests_per_second=self.rate,
            seconds=self.seconds,
            cv=self.cv,
            lengths=drawn,
            seed=self.seed,
        )


def gamma_cells(  # noqa: PLR0913 - what a table is made of, each named by its caller
    *,
    sizes: Sequence[str],
    lengths: Sequence[str],
    rates: Sequence[float],
    cvs: Sequence[float],
    seconds: float,
    seeds: Sequence[int],
) -> Iterator[Cell]:
    """Yield cells of Gamma arrivals, seed by seed within a row."""
    for size in sizes:
        for kind in lengths:
            for rate in rates:
                for cv in cvs:
                    for seed in seeds:
                        yield Cell(models=size, lengths=kind, rate=rate, cv=cv, seconds=seconds, seed=seed)


def swept_cells(*, cvs: Sequence[float], seconds: float, seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield other variations than the paper's, then recorded traces: Azure's functions and LLM requests."""
    yield from gamma_cells(
        sizes=SIZES[:1], lengths=tuple(LENGTHS), rates=(SWEPT_RATE,), cvs=cvs, seconds=seconds, seeds=seeds
    )
    for recorded in (*(f"functions {minute}" for minute in FIRST_MINUTES), *AZURE_LLM):
        for seed in seeds:
            yield Cell(
                models=SIZES[0],
                lengths="GSM8K",
                rate=SWEPT_RATE,
                cv=0.0,
                seconds=seconds,
                seed=seed,
                recorded=recorded,
            )


def whole(*, seconds: float, seeds: Sequence[int]) -> list[Cell]:
    """Return every cell: the paper's, other variations, recorded traces."""
    cells = gamma_cells(
        sizes=SIZES, lengths=tuple(LENGTHS), rates=RATES, cvs=(8.0,), seconds=seconds, seeds=seeds
    )
    return [*cells, *swept_cells(cvs=CVS, seconds=seconds, seeds=seeds)]


def floor_seconds(specs: Sequence[ModelSpec], requests: Sequence[Request]) -> np.ndarray:
    """Return how long each request waits when starts take no time: first come, first served."""
    device = PAPER_NODE.device
    models = {model.name: model for model in specs}
    slots = specs[0].devices_on(device)
    free = [0.0] * (NODES * (PAPER_NODE.device_count // slots))
    waits = []
    for request in requests:
        model = models[request.model]
        began = max(heapq.heappop(free), request.arrival_seconds)
        waits.append(began - request.arrival_seconds)
        decoding = model.token_seconds(device) * (request.output_tokens - 1)
        heapq.heappush(free, began + model.prefill_seconds(device, request.input_tokens) + decoding)
    return np.array(waits)


def _recorded_requests(path: Path, names: Sequence[ModelName], cell: Cell) -> list[Request]:
    """Return every tenth request of an LLM trace, a tenth for each seed, dealt to the models in turn."""
    read = traces.read_requests(path, names)
    first = (cell.seed - 1) % AZURE_EVERY
    kept = [each for each in read[first::AZURE_EVERY] if each.arrival_seconds < cell.seconds]
    return [
        Request(
            each.arrival_seconds,
            names[place % len(names)],
            min(each.input_tokens, CONTEXT_TOKENS // 2),
            max(1, min(each.output_tokens, CONTEXT_TOKENS // 2)),
        )
        for place, each in enumerate(kept)
    ]
