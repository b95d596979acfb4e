"""Placement policies in the setting of ServerlessLLM's scheduling experiments (OSDI '24, section 7).

Four hosts of four A40, OPT models of one size, Gamma arrivals with a coefficient of variation of 8 per model,
lengths from GSM8K and ShareGPT, a time-out of 300 s, one session per replica, a keep-alive as long as a load.
Compared is the 99th percentile of start-up times: the policy's over ours, same requests, same seed. The paper
reports 1.95 ("Serverless", a random node) and 1.27 ("Shepherd*", which preempts) for its own scheduler.

*floor* is what no policy that serves in order of arrival can beat: the same requests on the same devices when
starts take no time. The most that anybody can win over a policy is the policy's 99th percentile over that.

    python benchmarks/policies.py                  both lengths at 0.2, 0.8 and 1.4 requests/s
    python benchmarks/policies.py --quick          one row each, a minute
    python benchmarks/policies.py --sweep          CV 1, 2, 4 and 8, then the Azure traces
    python benchmarks/policies.py --models opt-13b:16,opt-30b:8 --rates 0.2
    python benchmarks/policies.py --whole --standing 120 --jobs 2 --results policies.jsonl
                                                   every row of docs/simulator.md; goes on if cut off

By default the first request comes the moment the models are deployed, when memory everywhere is empty. With
`--standing` ours is also run on a cluster that has stood so long, and has filled memory from disk
(docs/scaling.md). The other policies do nothing before the first request, so they have the same figures.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from arguments import not_negative, not_negative_float, positive, positive_float, positive_floats
from policy_cells import LENGTHS, NODES, Cell, floor_seconds, gamma_cells, swept_cells, whole
from policy_results import OURS, TARGETS, Figures, Results, Row, Run, row_of, table

from services.controller.simulation import scenario
from services.controller.simulation.hardware import PAPER_NODE
from stoker.errors import StokerError


def simulate(run: Run) -> tuple[Run, Figures, float]:
    """Return a run's figures, and the processor time that it took, seconds."""
    began = time.process_time()
    (summary,) = scenario.simulate(
        [run.policy],
        [PAPER_NODE] * NODES,
        run.cell.specs(),
        run.cell.requests(),
        seed=run.cell.seed,
        standing_seconds=run.standing_seconds,
    )
    return run, Figures.of(summary), time.process_time() - began


def run_all(runs: Sequence[Run], results: Results, *, jobs: int) -> None:
    """Simulate what is not known yet, so many at a time, and tell of each when it is done."""
    left = [run for run in runs if run.key not in results.found]
    for done, (run, figures, seconds) in enumerate(_simulated(left, jobs), start=1):
        results.add(run, figures)
        stood = f", standing {run.standing_seconds:g} s" if run.standing_seconds else ""
        print(
            f"{done:>4}/{len(left)} {run.cell.row}, seed {run.cell.seed}, {run.policy}{stood}: "
            f"{figures.mean_seconds:.2f} / {figures.p99_seconds:.2f} s, {figures.lost} lost; {seconds:.0f} s",
            flush=True,
        )


def _simulated(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Run, Figures, float]]:
    if jobs <= 1:
        yield from map(simulate, runs)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(simulate, run) for run in runs]):
            yield done.result()


def rows_of(
    cells: Sequence[Cell], results: Results, policies: Sequence[str], standing_seconds: float
) -> list[Row]:
    """Return the table's rows, in the order of the cells."""
    by_row: dict[str, list[Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, []).append(cell)
    rows = []
    for same in by_row.values():
        floors = []
        for cell in same:
            waits = floor_seconds(cell.specs(), cell.requests())
            floors.append((float(waits.mean()), float(np.percentile(waits, 99))))
        rows.append(row_of(same, floors, results, policies, standing_seconds))
    return rows


def judge(rows: Sequence[Row], policies: Sequence[str]) -> bool:
    """Print the ratios and what they could be at most; tell whether the medians reach the paper's."""
    verdicts, met = [], True
    for name in policies:
        if name == OURS:
            continue
        ratios = [row.ratio(name) for row in rows]
        most = [row.by_policy[name][1] / row.floor[1] for row in rows if row.floor[1] > 0]
        target, median = TARGETS.get(name), statistics.median(ratios)
        met = met and (target is None or median >= target)
        aim = f" (target {target})" if target else ""
        limit = f", at most {statistics.median(most):.2f}x possible where requests queue" if most else ""
        verdicts.append(f"{name} {median:.2f}x{aim}, {min(ratios):.2f} to {max(ratios):.2f}{limit}")
    print(f"P99 of start-up over ours: {'; '.join(verdicts)}: {'met' if met else 'MISSED'}")
    return met


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    if arguments.whole:
        return whole(seconds=arguments.seconds, seeds=seeds)
    if arguments.sweep:
        return list(swept_cells(cvs=(1.0, 2.0, 4.0, 8.0), seconds=arguments.seconds, seeds=seeds))
    return list(
        gamma_cells(
            sizes=arguments.models.split(","),
            lengths=[_length(name) for name in arguments.lengths.split(",")],
            rates=arguments.rates,
            cvs=arguments.cvs,
            seconds=arguments.seconds,
            seeds=seeds,
        )
    )


def _length(name: str) -> str:
    found = [each for each in LENGTHS if each.lower() == name.lower()]
    if not found:
        raise SystemExit(f"--lengths {name!r}: there are {', '.join(LENGTHS)}")
    return found[0]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="opt-6.7b:32", help="comma separated; one row each")
    parser.add_argument("--lengths", default="gsm8k,sharegpt")
    parser.add_argument("--rates", type=positive_floats, default="0.2,0.8,1.4")
    parser.add_argument("--cvs", type=positive_floats, default="8")
    parser.add_argument("--seconds", type=positive_float, default=450.0)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--first-seed", type=not_negative, default=1)
    parser.add_argument(
        "--standing",
        type=not_negative_float,
        default=0.0,
        help="seconds that a cluster stands before the first request",
    )
    parser.add_argument("--policies", default="stoker,shepherd,serverless", help="ours is among them")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time")
    parser.add_argument("--results", type=Path, help="keeps what is found; what is there is not run again")
    parser.add_argument("--quick", action="store_true", help="0.8 requests/s, one seed")
    parser.add_argument("--sweep", action="store_true", help="CVs at 0.8 requests/s; Azure traces")
    parser.add_argument("--whole", action="store_true", help="sizes, lengths, rates, CVs and Azure traces")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rates, arguments.seeds = [0.8], 1
    policies = arguments.policies.split(",")
    if unknown := set(policies) - set(scenario.POLICIES):
        known = ", ".join(sorted(scenario.POLICIES))
        parser.error(f"--policies: {', '.join(sorted(unknown))}: there are {known}")
    if OURS not in policies:
        parser.error(f"--policies lacks {OURS}: the others are compared with it")
    try:
        for models in arguments.models.split(","):
            scenario.parse_models(models)
    except StokerError as error:
        parser.error(str(error))
    return arguments


def main() -> int:
    """Run every cell; 0 when the median ratios reach the paper's."""
    arguments = _arguments()
    policies = arguments.policies.split(",")
    print(f"{platform.machine()}, Python {platform.python_version()}: {' '.join(sys.argv)}")
    print("start-up mean / 99th percentile in seconds, lost requests; processor seconds")
    cells = _cells(arguments)
    stood = {OURS: [arguments.standing]} if arguments.standing else {}
    by_seed = sorted(cells, key=lambda cell: cell.seed)
    runs = [
        Run(cell=cell, policy=policy, standing_seconds=seconds)
        for cell in by_seed
        for policy in policies
        for seconds in (0.0, *stood.get(policy, ()))
    ]
    results = Results(arguments.results)
    run_all(runs, results, jobs=arguments.jobs)
    rows = rows_of(cells, results, policies, arguments.standing)
    print("\nmeans over the seeds; bold: the paper's margin is reached", *table(rows, policies), sep="\n")
    return 0 if judge(rows, policies) else 1


if __name__ == "__main__":
    sys.exit(main())
