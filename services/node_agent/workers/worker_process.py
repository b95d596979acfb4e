"""A worker's operating system process: forked or started, watched, ended, and cleaned up after."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.node_agent.workers.fork_server import ForkServer, NoForkServer
from services.node_agent.workers.forked_child import ForkedChild, describe_exit
from services.node_agent.workers.replica_workers import SOCKET_SUFFIX, STORE_SUFFIX
from services.node_agent.workers.worker_log import WorkerLog
from stoker.ids import WorkerId
from stoker.units import KIB

KILL_AFTER_SECONDS = 1.0
"""A worker holds nothing that outlives it: it gets little time between SIGTERM and SIGKILL."""

LAST_OUTPUT_SECONDS = 0.2
"""After a worker's end its pipe is read for this long at most: a process it left behind may hold it open."""

_PIPE_READ_BYTES = 64 * KIB


def default_threads() -> int:
    """Return the processors of this host less one, which stays free for the services that carry the tokens.

    A worker's threads meet at a barrier after every product, so one that has to wait for its processor holds
    up all others. Measured on 2 cores that lost time to neighbours, SmolLM2-135M in float32, 8 streams: 3 to
    16 tokens/s with 2 threads, 17.5 with 1 (`benchmarks/engine_alone.py` under `OMP_NUM_THREADS`); on quiet
    cores 24 and 18.
    """
    return max(1, (os.cpu_count() or 1) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How workers are run on this host."""

    threads: int
    """Of one worker's arithmetic; 0 = as many as there are processors."""
    warm_up_niceness: int
    """Of the thread that imports; what serves later is not affected."""
    log_level: str
    """Lowest level a worker logs."""
    environment: Mapping[str, str]
    """Added to this process's own; the same for every worker that the fork server gives."""


def worker_environment(*, threads: int, further: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker, or of the server that forks it.

    Args:
        threads: As in `WorkerOptions`.
        further: The operator's own, which win.
    """
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads or default_threads()),
        "OPENBLAS_NUM_THREADS": "1",  # numpy starts them when it is imported, and nothing computes with it
        "PYTHONUNBUFFERED": "1",
        **further,
    }


class WorkerProcess:
    """A running `python -m services.worker`, in a session (process group) of its own.

    Make one with `start`; `wait` must be awaited by somebody, it reaps the process.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        process: asyncio.subprocess.Process | ForkedChild,
        socket: Path,
        output: WorkerLog,
    ) -> None:
        self.worker_id = worker_id
        self.socket = socket
        self.log = output
        self._process = process

    @classmethod
    async def start(
        cls,
        worker_id: WorkerId,
        options: WorkerOptions,
        socket: Path,
        output: WorkerLog,
        fork_server: ForkServer,
    ) -> WorkerProcess:
        """Start a worker: forked where that can be, else as a new interpreter.

        Args:
            worker_id: Its id, new; the worker says it back.
            options: How workers are run on this host.
            socket: Where it will listen; nothing is there.
            output: Takes what it prints.
            fork_server: With the same environment.

        Raises:
            OSError: The process could not be started.
        """
        arguments = (
            *("--socket", str(socket)),
            *("--worker-id", worker_id),
            *("--parent-pid", str(os.getpid())),
            *("--threads", str(options.threads or default_threads())),
            *("--warm-up-niceness", str(options.warm_up_niceness)),
            *("--log-level", options.log_level),
        )
        process: asyncio.subprocess.Process | ForkedChild
        try:
            process = await fork_server.fork(arguments, niceness=options.warm_up_niceness)
        except NoForkServer:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "services.worker", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env=worker_environment(threads=options.threads, further=options.environment),
            )
        return cls(worker_id, process, socket, output)

    @property
    def pid(self) -> int:
        """Return the process's id."""
        return self._process.pid

    @property
    def is_forked(self) -> bool:
        """Tell whether it shares its imports with others."""
        return isinstance(self._process, ForkedChild)

    async def wait(self) -> str:
        """Return how the process ended, for people, once it has; its sockets are gone then."""
        async with asyncio.TaskGroup() as tasks:
            copying = tasks.create_task(self._copy_output())
            code = await self._process.wait()
            await asyncio.wait([copying], timeout=LAST_OUTPUT_SECONDS)
            copying.cancel()
        self.log.end()
        for suffix in (self.socket.suffix, SOCKET_SUFFIX, STORE_SUFFIX):
            self.socket.with_suffix(suffix).unlink(missing_ok=True)
        return describe_exit(code)

    async def _copy_output(self) -> None:
        if self._process.stdout is None:
            raise AssertionError("the worker's output is a pipe")
        while output := await self._process.stdout.read(_PIPE_READ_BYTES):
            self.log.write(output)

    async def end(self, kill_after_seconds: float = KILL_AFTER_SECONDS) -> None:
        """Send SIGTERM, then SIGKILL to the whole group; returns once the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(kill_after_seconds):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """Send SIGKILL to the process and all it started."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:
                self._process.send_signal(signal.SIGKILL)  # a worker forked just now leads no group yet
                os.killpg(self._process.pid, signal.SIGKILL)
