"""Does the simulator carry a fleet? Nodes, models and requests in minutes on one core.

Hosts of eight H100, OPT-6.7B models with popularity falling as 1/rank, Poisson arrivals, GSM8K lengths, eight
sessions per replica. The controller's own decisions run as in every simulation (`stoker`, without forecasts).
Judged: processor time per request; at 600 us a million take ten minutes. How far it has come is said every
50,000 requests; the processor time of the last line has all of it, the first reports of all nodes included.

    python benchmarks/scale.py                                              the target's size
    python benchmarks/scale.py --nodes 100 --models 1000 --requests 20000   a minute
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from arguments import positive

from services.controller.simulation import scenario, traces, workload
from services.controller.simulation.hardware import opt_models
from services.controller.simulation.report import table

LENGTHS = Path(__file__).parent / "traces" / "gsm8k_lengths_gpt2bpe.csv.gz"
TARGET_MICROSECONDS = 600.0
"""A request: a million of them in ten minutes."""
CONCURRENCY = 8
KEEP_ALIVE_SECONDS = 60.0
REQUESTS_PER_SECOND_AND_NODE = 2.0
SAID_EVERY = 50_000


class Said(list[workload.Request]):
    """Requests that say how many of them have arrived, and what processor time that took."""

    def __iter__(self) -> Iterator[workload.Request]:
        """Yield each, and print a line now and then."""
        began = before = time.process_time()
        for number, request in enumerate(super().__iter__(), 1):
            if number % SAID_EVERY == 0:
                now = time.process_time()
                each_microseconds = 1e6 * (now - before) / SAID_EVERY
                print(
                    f"{number} requests after {now - began:.0f} s of processor time; "
                    f"the last {SAID_EVERY}: {each_microseconds:.0f} us each",
                    flush=True,
                )
                before = now
            yield request


def main() -> int:
    """Run it; 0 = within the target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=positive, default=1000)
    parser.add_argument("--models", type=positive, default=10_000)
    parser.add_argument("--requests", type=positive, default=1_000_000)
    parser.add_argument("--policy", default="reactive", choices=sorted(scenario.POLICIES))
    arguments = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}: {' '.join(sys.argv)}")
    models = [
        replace(model, concurrency=CONCURRENCY, keep_alive_seconds=KEEP_ALIVE_SECONDS)
        for model in opt_models("opt-6.7b", arguments.models)
    ]
    rate = REQUESTS_PER_SECOND_AND_NODE * arguments.nodes
    began = time.process_time()
    requests = workload.gamma_requests(
        [model.name for model in models],
        requests_per_second=rate,
        seconds=arguments.requests / rate,
        cv=1.0,
        lengths=traces.read_lengths(LENGTHS, context_tokens=2048),
        seed=1,
        popularity=[1.0 / rank for rank in range(1, len(models) + 1)],
    )
    if not requests:
        parser.error(f"--requests {arguments.requests}: by chance none arrives, ask for more")
    made_seconds = time.process_time() - began
    print(f"{len(requests)} requests at {rate:g}/s made in {made_seconds:.0f} s", flush=True)
    began, began_wall = time.process_time(), time.perf_counter()
    hosts = [scenario.H100_NODE] * arguments.nodes
    summaries = scenario.simulate([arguments.policy], hosts, models, Said(requests), seed=1)
    taken_seconds, wall_seconds = time.process_time() - began, time.perf_counter() - began_wall
    print(table(summaries))
    each_microseconds = 1e6 * taken_seconds / len(requests)
    met = each_microseconds <= TARGET_MICROSECONDS
    print(
        f"{arguments.nodes} nodes, {arguments.models} models, {len(requests)} requests: "
        f"{taken_seconds:.0f} s of processor time ({wall_seconds:.0f} s by the wall clock), "
        f"{each_microseconds:.0f} us a request "
        f"(target {TARGET_MICROSECONDS:.0f} us): {'met' if met else 'MISSED'}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
