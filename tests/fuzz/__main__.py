"""Fuzz the readers of checkpoints: `python -m tests.fuzz [--inputs 100000] [--engine mutations|atheris]`.

A finding is an exception that is not the refusal meant for bad files, a promise broken by what was accepted,
more than `SECONDS` of processor time for one input, or more memory than the input's size allows. It is
written to the current folder, and the exit status is 1.
"""

# ruff: noqa: T201 - a command prints

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from types import FrameType, FunctionType

from tests.fuzz.mutations import MAX_INPUT_BYTES, mutated
from tests.fuzz.targets import Target, targets

SECONDS = 5
"""Of processor time for one input: wall time says more about the host."""

MEMORY_FACTOR = 64
"""Python objects take this many times the bytes of the JSON that they were parsed from, at most."""

MEMORY_FLOOR_BYTES = 1 << 20
SPARE_BYTES = 64 << 20
"""What the process may take beyond what it has at the start: for the inputs whose memory is not traced."""

TRACED_EVERY = 60
MAX_FINDINGS = 20


class Hang(Exception):
    """An input took too long."""


def run_one(target: Target, content: bytes, *, traced: bool) -> bool:
    """Give one input to a target; returns whether it was accepted.

    Args:
        target: To be fuzzed.
        content: The input.
        traced: Measure what it takes of memory; slow.

    Raises:
        Exception: A finding.
    """
    if traced:
        tracemalloc.start()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        accepted = target.accepts(content)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _, taken = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    allowed = MEMORY_FLOOR_BYTES + MEMORY_FACTOR * len(content)
    if taken > allowed:
        raise MemoryError(f"{taken:,} bytes for an input of {len(content):,}, allowed are {allowed:,}")
    return accepted


def by_mutations(chosen: list[Target], *, inputs: int, seed: int) -> int:
    """Give mutated seeds to the targets in turn; returns the number of findings."""
    random_ = random.Random(seed)
    counts: Counter[tuple[str, bool]] = Counter()
    findings = 0
    slowest = 0.0
    for number in range(inputs):
        target = chosen[number % len(chosen)]
        content = mutated(random_.choice(target.seeds), random_)
        if random_.getrandbits(1):
            content = target.repaired(content)
        began = time.perf_counter()
        try:
            traced = number % TRACED_EVERY < len(chosen)
            counts[target.name, run_one(target, content, traced=traced)] += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            findings += 1
            path = Path(f"finding-{target.name}-{number}")
            path.write_bytes(content)
            print(f"{path}: {type(error).__name__}: {str(error)[:300]}")
            if findings >= MAX_FINDINGS:
                break
        slowest = max(slowest, time.perf_counter() - began)
    for target in chosen:
        refused, accepted = counts[target.name, False], counts[target.name, True]
        print(f"{target.name:<12} {refused:>8,} refused {accepted:>8,} accepted")
    print(f"slowest input {slowest * 1000:.0f} ms, seed {seed}")
    print(f"{'MISSED' if findings else 'met'}: {findings} findings in {inputs:,} inputs (target 0)")
    return findings


def by_atheris(chosen: list[Target], *, inputs: int, seed: int) -> None:
    """Let atheris look for new paths; ends the process with its status."""
    import atheris

    def one(data: bytes) -> None:
        if data:
            run_one(chosen[data[0] % len(chosen)], bytes(data[1:]), traced=False)

    corpus = Path("corpus")
    corpus.mkdir(exist_ok=True)
    for number, target in enumerate(chosen):
        for index, content in enumerate(target.seeds):
            (corpus / f"{target.name}-{index}").write_bytes(bytes([number]) + content)
    options = [f"-runs={inputs}", f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def _instrument() -> None:
    """Make the readers of checkpoints tell atheris which paths an input takes."""
    import atheris

    for name, module in list(sys.modules.items()):
        if not name.startswith("stoker.checkpoint"):
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, FunctionType) and value.__module__ == name:
                setattr(module, key, atheris.instrument_func(value))


def _hang(_signal: int, _frame: FrameType | None) -> None:
    raise Hang(f"more than {SECONDS} s of processor time")


def main() -> int:
    """Run the command; 0 = nothing found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("mutations", "atheris"), default="mutations")
    parser.add_argument("--target", default="", help="only this one")
    arguments = parser.parse_args()
    if arguments.engine == "atheris":
        _instrument()
    chosen = [target for target in targets() if arguments.target in {"", target.name}]
    signal.signal(signal.SIGPROF, _hang)
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + SPARE_BYTES, resource.RLIM_INFINITY))
    if arguments.engine == "atheris":
        by_atheris(chosen, inputs=arguments.inputs, seed=arguments.seed)
    return 1 if by_mutations(chosen, inputs=arguments.inputs, seed=arguments.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
