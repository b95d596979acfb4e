"""What a further worker costs: forked from a process with its imports done, and started directly, in turn.

    python benchmarks/worker_start.py [--rounds 3]

Prints processor seconds, seconds until it is warm, and memory of its own (USS) of each; last, how many
times less processor time a forked worker takes, beside the target. Exit status 1: missed.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import uvloop
from arguments import positive
from setting import print_heading

from services.node_agent.background import Background
from services.node_agent.workers.fork_server import ForkServer
from services.node_agent.workers.worker_log import WorkerLog
from services.node_agent.workers.worker_process import WorkerOptions, WorkerProcess, worker_environment
from stoker.ids import WorkerId
from stoker.rpc import connect
from stoker.units import MIB
from stoker.v1.worker_pb2 import DescribeWorkerRequest
from stoker.v1.worker_pb2_grpc import WorkerStub

TARGET = 10.0
"""Times less processor time; importing is all that differs, so anything less means that a fork imports."""

WARM_SECONDS = 300.0
OPTIONS = WorkerOptions(threads=1, warm_up_niceness=0, log_level="INFO", environment={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One worker's start."""

    processor_seconds: float
    warm_seconds: float
    own_bytes: int


async def start(folder: Path, name: str, server: ForkServer) -> Start:
    """Start a worker, wait until it is warm, and end it."""
    began_seconds = time.monotonic()
    socket = folder / f"{name}.sock"
    log = WorkerLog(folder / f"{name}.log")
    worker = await WorkerProcess.start(WorkerId(name), OPTIONS, socket, log, server)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.wait())
        async with connect(f"unix:{socket}") as channel:
            wanted = DescribeWorkerRequest()
            await WorkerStub(channel).DescribeWorker(wanted, wait_for_ready=True, timeout=WARM_SECONDS)
        warm_seconds = time.monotonic() - began_seconds
        process = psutil.Process(worker.pid)
        times, memory = process.cpu_times(), process.memory_full_info()
        await worker.end()
    return Start(
        processor_seconds=times.user + times.system, warm_seconds=warm_seconds, own_bytes=int(memory.uss)
    )


async def compare(rounds: int) -> tuple[list[Start], list[Start]]:
    """Return forked and direct starts, taken in turn, without the first forked one: it starts the server."""
    background = Background(lambda: sys.exit("the fork server's task crashed"))
    environment = worker_environment(threads=OPTIONS.threads, further={})
    forking = ForkServer(environment, background.spawn)
    none = ForkServer(environment, background.spawn, enabled=False)
    forked, direct = [], []
    with tempfile.TemporaryDirectory(prefix="stoker-") as folder:
        await start(Path(folder), "first", forking)
        for index in range(rounds):
            forked.append(await start(Path(folder), f"forked-{index}", forking))
            direct.append(await start(Path(folder), f"direct-{index}", none))
        await background.close()
    return forked, direct


def line(name: str, starts: Sequence[Start]) -> str:
    """Return the medians of one way."""
    processor = statistics.median(start.processor_seconds for start in starts)
    warm = statistics.median(start.warm_seconds for start in starts)
    own = statistics.median(start.own_bytes for start in starts)
    return f"{name:<8} {processor:7.2f} s processor {warm:7.2f} s until warm {own / MIB:6.0f} MiB of its own"


def main() -> int:
    """Run and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3)
    rounds = parser.parse_args().rounds
    print_heading("a further worker, forked and started directly in turn")
    forked, direct = uvloop.run(compare(rounds))
    print(line("forked", forked))
    print(line("direct", direct))
    ratio = statistics.median(s.processor_seconds for s in direct) / statistics.median(
        s.processor_seconds for s in forked
    )
    print(f"{ratio:.0f} times less processor time for a forked worker (target {TARGET:.0f})")
    return 0 if ratio >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
