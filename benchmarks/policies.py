"""Placement policies in the setting of ServerlessLLM's scheduling experiments (OSDI '24, section 7).

Four hosts of four A40, OPT models of one size, Gamma arrivals with a coefficient of variation of 8 per model,
lengths from GSM8K and ShareGPT, a time-out of 300 s, one session per replica, a keep-alive as long as a load.
Compared is the 99th percentile of start-up times: the policy's over ours, same requests, same seed. The paper
reports 1.95 ("Serverless", a random node) and 1.27 ("Shepherd*", which preempts) for its own scheduler.

*floor* is what no policy that serves in order of arrival can beat: the same requests on the same devices when
starts take no time. The most that anybody can win over a policy is the policy's 99th percentile over that.

    python benchmarks/policies.py                  both lengths at 0.2, 0.8 and 1.4 requests/s
    python benchmarks/policies.py --quick          one cell each, a minute
    python benchmarks/policies.py --sweep          CV 1, 2, 4 and 8, then the Azure traces
    python benchmarks/policies.py --models opt-13b:16,opt-30b:8 --rates 0.2
    python benchmarks/policies.py --standing 120   the cluster has stood for two minutes by then

By default the first request comes the moment the models are deployed, when memory everywhere is empty; a
cluster that has stood has filled it from disk (docs/scaling.md). Policies that don't forecast do nothing
before the first request, whenever it comes.
"""

from __future__ import annotations

import argparse
import heapq
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.controller.simulation import scenario, workload
from services.controller.simulation.hardware import PAPER_NODE, ModelSpec
from services.controller.simulation.report import Summary
from services.controller.simulation.workload import Request

TRACES = Path(__file__).parent / "traces"
LENGTHS = {"gsm8k": "gsm8k_lengths_gpt2bpe.csv.gz", "sharegpt": "sharegpt_lengths_llama2.csv.gz"}
AZURE_FUNCTIONS = TRACES / "azure_functions_2019_1350f_1day.csv.gz"
AZURE_LLM = {"code": "azure_llm_2023_code.csv.gz", "conv": "azure_llm_2023_conv.csv.gz"}
TARGETS = {"serverless": 1.95, "shepherd": 1.27}
NODES = 4
CONTEXT_TOKENS = 2048
AZURE_EVERY = 10
"""Of the LLM traces' requests every tenth is kept: 2.4 and 5.4 requests/s are more than 16 A40 serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row of the table: a name, models, and the requests."""

    name: str
    models: Sequence[ModelSpec]
    requests: Sequence[Request]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a cell gave: figures by policy, and the floor's mean and 99th percentile in seconds."""

    summaries: dict[str, Summary]
    floor_mean: float
    floor_p99: float


def floor_seconds(cell: Cell) -> np.ndarray:
    """Return how long each request waits when starts take no time: first come, first served."""
    device = PAPER_NODE.device
    models = {model.name: model for model in cell.models}
    slots = cell.models[0].devices_on(device)
    free = [0.0] * (NODES * (PAPER_NODE.device_count // slots))
    waits = []
    for request in cell.requests:
        model = models[request.model]
        began = max(heapq.heappop(free), request.arrival_seconds)
        waits.append(began - request.arrival_seconds)
        decoding = model.token_seconds(device) * (request.output_tokens - 1)
        heapq.heappush(free, began + model.prefill_seconds(device, request.input_tokens) + decoding)
    return np.array(waits)


def run(cell: Cell, policies: list[str], standing_seconds: float) -> Result:
    """Return each policy's figures over the same requests, and print the row."""
    began = time.process_time()
    summaries = scenario.simulate(
        policies,
        [PAPER_NODE] * NODES,
        cell.models,
        cell.requests,
        seed=cell.seed,
        standing_seconds=standing_seconds,
    )
    waits = floor_seconds(cell)
    rate, cv = workload.realised(cell.requests)
    result = Result(
        summaries=dict(zip(policies, summaries, strict=True)),
        floor_mean=float(waits.mean()),
        floor_p99=float(np.percentile(waits, 99)),
    )
    columns = "".join(
        f"{found.startup_mean:8.2f} /{found.startup_p99:7.2f}{found.lost:4}" for found in summaries
    )
    print(
        f"{cell.name:<34}{cell.seed:>3}{len(cell.requests):>6}{rate:>6.2f}{cv:>6.1f}{columns}"
        f"{result.floor_mean:8.2f} /{result.floor_p99:7.2f}{time.process_time() - began:5.0f}",
        flush=True,
    )
    return result


def gamma_cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Yield the paper's cells: sizes, lengths, rates, CVs and seeds."""
    for size in arguments.models.split(","):
        models = scenario.parse_models(size)
        for lengths in arguments.lengths.split(","):
            drawn = workload.read_lengths(TRACES / LENGTHS[lengths], context_tokens=CONTEXT_TOKENS)
            for rate in map(float, arguments.rates.split(",")):
                for cv in map(float, arguments.cvs.split(",")):
                    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
                        requests = workload.gamma_requests(
                            [model.name for model in models],
                            requests_per_second=rate,
                            seconds=arguments.seconds,
                            cv=cv,
                            lengths=drawn,
                            seed=seed,
                        )
                        name = f"{size} {lengths} {rate:g}/s CV {cv:g}"
                        yield Cell(name=name, models=models, requests=requests, seed=seed)


def azure_cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Yield the traces that others recorded: Azure's functions of 2019, and its LLM requests of 2023."""
    models = scenario.parse_models("opt-6.7b:32")
    names = [model.name for model in models]
    drawn = workload.read_lengths(TRACES / LENGTHS["gsm8k"], context_tokens=CONTEXT_TOKENS)
    minutes = max(1, round(arguments.seconds / 60))
    for first in (1, 601):
        requests = workload.read_invocations(
            AZURE_FUNCTIONS,
            names,
            drawn,
            minutes=range(first, first + minutes),
            requests_per_second=0.8,
            seed=1,
        )
        yield Cell(name=f"Azure functions minute {first} 0.8/s", models=models, requests=requests, seed=1)
    for kind, file in AZURE_LLM.items():
        read = workload.read_requests(TRACES / file, names)
        kept = [each for each in read[::AZURE_EVERY] if each.arrival_seconds < arguments.seconds]
        requests = [
            Request(
                each.arrival_seconds,
                names[place % len(names)],
                min(each.input_tokens, CONTEXT_TOKENS // 2),
                max(1, min(each.output_tokens, CONTEXT_TOKENS // 2)),
            )
            for place, each in enumerate(kept)
        ]
        yield Cell(name=f"Azure LLM {kind}, 1 in {AZURE_EVERY}", models=models, requests=requests, seed=1)


def judge(results: list[Result], policies: list[str]) -> bool:
    """Print the ratios and what they could be at most; tell whether the medians reach the paper's."""
    verdicts, met = [], True
    for name in policies[1:]:
        pairs = [(found.summaries[name].startup_p99, found) for found in results]
        ratios = [p99 / max(found.summaries[policies[0]].startup_p99, 1e-3) for p99, found in pairs]
        most = [p99 / found.floor_p99 for p99, found in pairs if found.floor_p99 > 0]
        target, median = TARGETS.get(name), statistics.median(ratios)
        met = met and (target is None or median >= target)
        aim = f" (target {target})" if target else ""
        limit = f", at most {statistics.median(most):.2f}x possible where requests queue" if most else ""
        verdicts.append(f"{name} {median:.2f}x{aim}, {min(ratios):.2f} to {max(ratios):.2f}{limit}")
    print(f"P99 of start-up over ours: {'; '.join(verdicts)}: {'met' if met else 'MISSED'}")
    return met


def main() -> int:
    """Run every cell; 0 when the median ratios reach the paper's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="opt-6.7b:32", help="comma separated; one cell each")
    parser.add_argument("--lengths", default="gsm8k,sharegpt")
    parser.add_argument("--rates", default="0.2,0.8,1.4")
    parser.add_argument("--cvs", default="8")
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument(
        "--standing", type=float, default=0.0, help="seconds that the cluster stands before the first request"
    )
    parser.add_argument("--policies", default="stoker,shepherd,serverless", help="the first one is ours")
    parser.add_argument("--quick", action="store_true", help="0.8 requests/s, 450 s, one seed")
    parser.add_argument("--sweep", action="store_true", help="CVs at 0.8 requests/s; Azure traces")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rates, arguments.seconds, arguments.seeds = "0.8", 450.0, 1
    if arguments.sweep:
        arguments.rates, arguments.cvs = "0.8", "1,2,4,8"
    policies = arguments.policies.split(",")
    print(f"{platform.machine()}, Python {platform.python_version()}: {' '.join(sys.argv)}")
    print("start-up mean / 99th percentile in seconds, and lost requests, by policy; processor seconds")
    heads = "".join(f"{name:>21}" for name in policies)
    print(f"{'':<34}{'':>3}{'n':>6}{'/s':>6}{'CV':>6}{heads}{'floor':>17}{'cpu':>5}")
    results = [run(cell, policies, arguments.standing) for cell in gamma_cells(arguments)]
    if arguments.sweep:
        results += [run(cell, policies, arguments.standing) for cell in azure_cells(arguments)]
    return 0 if judge(results, policies) else 1


if __name__ == "__main__":
    sys.exit(main())
