"""`make oracle`: the whole oracle, on a real model: `python -m benchmarks.oracle FOLDER`.

For every dtype, sampling and batch there is a run in which nothing happens, and runs with faults that must
give the same answer, bit by bit. In one kind replicas die (`kill`: the gateway's run goes on from its log, by
replay), in the other the session hops to another engine with its keys and values shipped (`move`). Every
token position from the first (kill: the prefill) to the last is the place of one fault; the positions of one
run lie `--apart` from each other, so that each is followed by that many tokens before the next one.

`--only` takes a part of the cases, `--results` writes what is done into a file and skips what is in it, so
that the whole can be done in parts. The last line is the figure beside its target; the exit status says
whether it was met: 2 = cases that were asked for are left undone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from services.gateway.text.model_text import ModelText
from services.worker.engine.protocol import EngineLimits, Sampling, Submit
from services.worker.engine.transformers_engine import TransformersEngine
from stoker import log
from stoker.ids import SessionId
from tests.integration.streams.engines import Answer, Replicas, answer, engine_model, text_of
from tests.integration.streams.test_oracle import GREEDY, PROMPT, SAMPLED
from tests.unit.services.worker.kv.test_kv_exchange import shipped, stopped_after
from tests.unit.services.worker.tiny_models import numbers, run

LIMITS = EngineLimits(max_batch=4, max_waiting=8, max_kv_tokens=4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": GREEDY, "sampled": SAMPLED}
BESIDE = tuple(
    Submit(
        session_id=SessionId(f"other-{number}"),
        prompt_token_ids=[(13 * i + number) % 200 + 20 for i in range(5 + 30 * number)],
        sampling=Sampling(temperature=0.5 * number, seed=number, max_tokens=200, ignore_eos=True),
    )
    for number in range(3)
)
BATCHES: dict[str, tuple[Submit, ...]] = {"alone": (), "mixed": BESIDE}
FAULTS = ("kill", "move")
NewEngine = Callable[[], TransformersEngine]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the runs of one line have in common."""

    dtype: str
    sampling: str
    batch: str
    fault: str

    @property
    def name(self) -> str:
        """Return how `--only` and the results call it."""
        return f"{self.dtype}-{self.sampling}-{self.batch}-{self.fault}"

    def runs(self, positions: int, apart: int) -> Iterator[tuple[int, ...]]:
        """Yield the positions of the faults of each run; together they are all of them."""
        first = 0 if self.fault == "kill" else 1  # before the first token there is nothing to ship
        for begin in range(first, min(first + apart, positions + 1)):
            yield tuple(range(begin, positions + 1, apart))


@dataclass(slots=True)
class Results:
    """What has been done, in a file where there is one: a line of JSON per run."""

    path: Path | None
    done: dict[tuple[str, tuple[int, ...]], bool] = field(default_factory=dict)
    """Whether a run's answer was the right one."""

    def read(self) -> None:
        """Take what the file has."""
        if self.path is not None and self.path.exists():
            for line in self.path.read_text().splitlines():
                found = json.loads(line)
                self.done[found["case"], tuple(found["positions"])] = found["equal"]

    def add(self, case: Case, positions: tuple[int, ...], *, equal: bool, seconds: float) -> None:
        """Remember a run."""
        self.done[case.name, positions] = equal
        if self.path is not None:
            with self.path.open("a") as file:
                line = {"case": case.name, "positions": positions, "equal": equal, "seconds": seconds}
                file.write(json.dumps(line) + "\n")


class Model:
    """One dtype's model, and the runs in which nothing happens.

    Args:
        folder: Of the checkpoint.
        dtype: To compute in.
        positions: Token positions of faults; answers are a little longer.
    """

    def __init__(self, folder: Path, dtype: str, text: ModelText, positions: int) -> None:
        model = engine_model(folder, DTYPES[dtype])
        self._new_engine: NewEngine = lambda: TransformersEngine(model, LIMITS)
        self._text = text
        self._tokens = positions + 2
        self._answers: dict[str, Answer] = {}
        self._numbers: dict[str, list[Any]] = {}

    async def is_equal(self, case: Case, positions: tuple[int, ...]) -> bool:
        """Make a run with faults; tell whether it gives what the one without gives."""
        how = SAMPLINGS[case.sampling] | {"max_tokens": self._tokens, "top_logprobs": 3, "ignore_eos": True}
        beside = BATCHES[case.batch]
        if case.fault == "kill":
            if case.sampling not in self._answers:
                faultless = Replicas(self._new_engine)
                self._answers[case.sampling] = await answer(faultless, self._text, PROMPT, **how)
            killed = Replicas(self._new_engine, positions, beside)
            found = await answer(killed, self._text, PROMPT, **how)
            return found == self._answers[case.sampling] and found.trace.hops == len(positions)
        sampling = Sampling(**({"seed": 11} | how))
        wanted = Submit(session_id=SessionId("s"), prompt_token_ids=PROMPT, sampling=sampling)
        if case.sampling not in self._numbers:
            self._numbers[case.sampling] = numbers(run(self._new_engine(), [wanted])[0]["s"])
        return (
            moved(self._new_engine, wanted, positions, beside, self._tokens) == self._numbers[case.sampling]
        )


def moved(
    new_engine: NewEngine, wanted: Submit, positions: Sequence[int], beside: Sequence[Submit], tokens: int
) -> list[Any]:
    """Return the tokens and log probabilities of a session that hops with its keys and values.

    Raises:
        RuntimeError: A destination computed what was shipped to it.
    """
    engine = new_engine()
    made = stopped_after(engine, wanted, positions[0])
    for position, following in zip(positions, [*positions[1:], tokens], strict=True):
        destination = new_engine()
        for other in beside[: 1 + position % 3]:
            destination.submit(other)
        for _ in range(position % 4 if beside else 0):
            destination.step()
        staged = shipped(engine.export_kv(wanted.session_id), destination)
        engine.close()
        engine = destination
        generated = [out.token_id for out in made]
        others_prefilled = engine.stats().prefill_token_count
        resumed = replace(wanted, generated_token_ids=generated, staged=staged)
        made += stopped_after(engine, resumed, following - position)
        computed = engine.stats().replay_token_count
        if not beside:
            computed += engine.stats().prefill_token_count - others_prefilled
        if computed:
            raise RuntimeError(f"{computed} tokens were computed again after the hop at {position}")
    engine.close()
    return numbers(made)


def cases(patterns: Sequence[str]) -> list[Case]:
    """Return the cases that match one of the patterns."""
    every = [
        Case(dtype=dtype, sampling=sampling, batch=batch, fault=fault)
        for dtype in DTYPES
        for batch in BATCHES
        for sampling in SAMPLINGS
        for fault in FAULTS
    ]
    return [case for case in every if any(fnmatch(case.name, pattern) for pattern in patterns)]


async def main() -> int:
    """Run the cases until they are done or the time is over; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument("--positions", type=int, default=64, help="token positions")
    parser.add_argument("--apart", type=int, default=8, help="tokens between two faults of a run")
    parser.add_argument("--only", nargs="+", default=["*"], help="cases, like 'bfloat16-*-alone-move'")
    parser.add_argument("--results", type=Path, help="file of what has been done; it is not done again")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="begin no run after this")
    asked = parser.parse_args()
    if min(asked.positions, asked.apart) < 1:
        parser.error("--positions and --apart are at least 1")
    log.configure("oracle", level="ERROR")  # a line per kill says nothing here
    chosen, began, skipped = cases(asked.only), time.monotonic(), 0
    if not chosen:
        parser.error(f"no case matches {' '.join(asked.only)}")
    results = Results(asked.results)
    results.read()
    text = text_of(asked.folder)
    models: dict[str, Model] = {}
    faults = differing = 0
    for case in chosen:
        count = equal = 0
        for positions in case.runs(asked.positions, asked.apart):
            if (case.name, positions) not in results.done:
                if time.monotonic() - began > asked.limit_seconds:
                    skipped += 1
                    continue
                if case.dtype not in models:
                    models = {case.dtype: Model(asked.folder, case.dtype, text, asked.positions)}
                begun = time.monotonic()
                right = await models[case.dtype].is_equal(case, positions)
                results.add(case, positions, equal=right, seconds=round(time.monotonic() - begun, 1))
            count += len(positions)
            equal += len(positions) * results.done[case.name, positions]
        faults, differing = faults + count, differing + count - equal
        print(f"{case.name}: {equal} of {count} left the answer as it was", flush=True)
    if skipped:
        print(f"out of time: {skipped} runs are left")
    print(f"kills and moves after which the answer differed: {differing} of {faults} (target: 0)")
    return 1 if differing else 2 if skipped or not faults else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
