"""Placement policies in the setting of ServerlessLLM's scheduling experiments (OSDI '24, section 7).

Four hosts of four A40, OPT models of one size, Gamma arrivals with a coefficient of variation of 8 per model,
lengths from GSM8K and ShareGPT, a time-out of 300 s, one session per replica, a keep-alive as long as a load.
Compared is the 99th percentile of start-up times: the policy's over ours, same requests, same seed. The paper
reports 1.95 ("Serverless", a random node) and 1.27 ("Shepherd*", which preempts) for its own scheduler.

    python benchmarks/policies.py                          the 6.7B models at 0.8 requests/s (minutes)
    python benchmarks/policies.py --rates 0.2,0.8,1.4 --models opt-6.7b:32,opt-13b:16,opt-30b:8 --cvs 1,2,4,8
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from services.controller.simulation import scenario, workload
from services.controller.simulation.hardware import PAPER_NODE
from services.controller.simulation.report import Summary, table

TRACES = Path(__file__).parent / "traces"
LENGTHS = {"gsm8k": "gsm8k_lengths_gpt2bpe.csv.gz", "sharegpt": "sharegpt_lengths_llama2.csv.gz"}
TARGETS = {"serverless": 1.95, "shepherd": 1.27}
NODES = 4
CONTEXT_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One cell of the table."""

    models: str
    lengths: str
    rate: float
    cv: float
    seconds: float


def run(setting: Setting, policies: list[str], seed: int) -> dict[str, Summary]:
    """Return each policy's figures over the same requests."""
    models = scenario.parse_models(setting.models)
    requests = workload.gamma_requests(
        [model.name for model in models],
        requests_per_second=setting.rate,
        seconds=setting.seconds,
        cv=setting.cv,
        lengths=workload.read_lengths(TRACES / LENGTHS[setting.lengths], context_tokens=CONTEXT_TOKENS),
        seed=seed,
    )
    rate, cv = workload.realised(requests)
    print(
        f"\n{setting.models} {setting.lengths} {setting.rate}/s CV {setting.cv:g} seed {seed}: "
        f"{len(requests)} requests, realised over all models {rate:.2f}/s, CV {cv:.1f}"
    )
    began = time.process_time()
    summaries = scenario.simulate(policies, [PAPER_NODE] * NODES, models, requests, seed=seed)
    print(table(summaries))
    print(f"simulated in {time.process_time() - began:.0f} s of processor time", flush=True)
    return dict(zip(policies, summaries, strict=True))


def main() -> int:
    """Run every cell; 0 when the median ratios reach the paper's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="opt-6.7b:32", help="comma separated; one cell each")
    parser.add_argument("--lengths", default="gsm8k,sharegpt")
    parser.add_argument("--rates", default="0.8")
    parser.add_argument("--cvs", default="8")
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--policies", default="stoker,shepherd,serverless", help="the first one is ours")
    arguments = parser.parse_args()
    policies = arguments.policies.split(",")
    print(f"{platform.machine()}, Python {platform.python_version()}: {' '.join(sys.argv)}")
    ratios: dict[str, list[float]] = {name: [] for name in policies[1:]}
    for models in arguments.models.split(","):
        for lengths in arguments.lengths.split(","):
            for rate in map(float, arguments.rates.split(",")):
                for cv in map(float, arguments.cvs.split(",")):
                    for seed in range(1, 1 + arguments.seeds):
                        setting = Setting(
                            models=models, lengths=lengths, rate=rate, cv=cv, seconds=arguments.seconds
                        )
                        found = run(setting, policies, seed)
                        for name in policies[1:]:
                            ours = max(found[policies[0]].startup_p99, 1e-3)
                            ratios[name].append(found[name].startup_p99 / ours)
    print()
    verdicts, met = [], True
    for name, values in ratios.items():
        target, median = TARGETS.get(name), statistics.median(values)
        met = met and (target is None or median >= target)
        aim = f" (target {target})" if target else ""
        verdicts.append(f"{name} {median:.2f}x{aim}, {min(values):.2f} to {max(values):.2f}")
    print(f"P99 of start-up over ours: {'; '.join(verdicts)}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
