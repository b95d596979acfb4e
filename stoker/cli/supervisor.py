"""Child services of `stoker up`: started in order, watched, restarted with back-off, stopped without a trace.

Each child is told our pid and ends when we do (`parent_pid`), so that even SIGKILL of `stoker up` leaves
nothing behind.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stoker import rpc
from stoker.errors import ConfigError, StokerError

MAX_BACKOFF_SECONDS = 10.0
STABLE_SECONDS = 30.0
"""A child that lived this long is restarted at once the next time."""
KILL_AFTER_SECONDS = 5.0
"""Beyond the child's own drain time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceCommand:
    """How to start one service."""

    name: str
    """For people and for the settings' prefix, e.g. `node_agent`."""
    module: str
    """What `python -m` runs, e.g. `services.node_agent`."""
    environment: Mapping[str, str]
    """STOKER_* settings."""
    health_address: str
    """host:port whose gRPC health tells that it serves."""
    log_path: Path
    ready_seconds: float = 90.0
    """How long it may take until it serves; one that can't start ends by itself, much sooner."""
    node_id: str = ""
    """Which node it belongs to, where several run side by side."""

    @property
    def title(self) -> str:
        """For people: the name, with its node where there are several."""
        return f"{self.name} of {self.node_id}" if self.node_id else self.name


@dataclass(slots=True)
class _Child:
    command: ServiceCommand
    process: asyncio.subprocess.Process
    began_seconds: float
    failures: int = 0
    watch: asyncio.Task[None] | None = field(default=None)


class Supervisor:
    """Starts services and keeps them running until `stop`.

    Args:
        drain_seconds: Given to each child between SIGTERM and SIGKILL, on top of `KILL_AFTER_SECONDS`.
    """

    def __init__(self, *, drain_seconds: float) -> None:
        self._drain_seconds = drain_seconds
        self._children: list[_Child] = []

    async def start(self, command: ServiceCommand) -> None:
        """Start a service and return when it answers health checks.

        Raises:
            ConfigError: It ended or did not become healthy; the message carries the end of its log.
        """
        log_begins = command.log_path.stat().st_size if command.log_path.exists() else 0
        process = await self._spawn(command)
        child = _Child(command=command, process=process, began_seconds=time.monotonic())
        self._children.append(child)
        await self._until_healthy(child, log_begins)
        child.watch = asyncio.create_task(self._keep_running(child), name=f"watch-{command.title}")

    async def stop(self) -> None:
        """Stop all services, the last one started first; returns when every process has been reaped."""
        watches = [child.watch for child in self._children if child.watch is not None]
        for watch in watches:
            watch.cancel()
        if watches:
            await asyncio.wait(watches)  # one may be in the middle of a restart
        for child in reversed(self._children):
            await self._end(child)
        self._children.clear()

    def pids(self) -> dict[str, int]:
        """Return the pid of each service by title."""
        return {child.command.title: child.process.pid for child in self._children}

    async def _spawn(self, command: ServiceCommand) -> asyncio.subprocess.Process:
        command.log_path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f"STOKER_{command.name.upper()}_"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(prefix)}
        with command.log_path.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                command.module,
                env=inherited | dict(command.environment) | {f"{prefix}PARENT_PID": str(os.getpid())},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches us alone; we stop them in order
            )

    async def _until_healthy(self, child: _Child, log_begins: int) -> None:
        command = child.command
        ended = asyncio.create_task(child.process.wait())
        healthy = asyncio.create_task(serving(command.health_address))
        try:
            done, _ = await asyncio.wait(
                {ended, healthy}, timeout=command.ready_seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ended.cancel()
            healthy.cancel()
        if healthy in done:
            return
        why = f"ended with status {child.process.returncode}" if ended in done else "did not become healthy"
        tail = _tail(command.log_path, log_begins)
        raise ConfigError(f"{command.title} {why}; its log ({command.log_path}) ends with:\n{tail}")

    async def _keep_running(self, child: _Child) -> None:
        """Restart the child each time it ends, sooner when it had lived long."""
        while True:
            await child.process.wait()
            lived_seconds = time.monotonic() - child.began_seconds
            child.failures = 0 if lived_seconds > STABLE_SECONDS else child.failures + 1
            await asyncio.sleep(min(0.1 * 2**child.failures, MAX_BACKOFF_SECONDS))
            child.process = await self._spawn(child.command)
            child.began_seconds = time.monotonic()

    async def _end(self, child: _Child) -> None:
        process = child.process
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._drain_seconds + KILL_AFTER_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def serving(address: str) -> None:
    """Return when the server at `address` says SERVING."""
    async with rpc.connect(address) as channel:
        while True:
            try:
                call = health_pb2_grpc.HealthStub(channel).Watch(
                    health_pb2.HealthCheckRequest(), wait_for_ready=True
                )
                async for answer in call:
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except (grpc.aio.AioRpcError, StokerError):
                await asyncio.sleep(0.05)  # it went away between connecting and answering


def _tail(path: Path, begins: int, lines: int = 8) -> str:
    """Return the last lines of a log, of those after byte `begins`: earlier ones are of earlier runs."""
    with path.open("rb") as log:
        log.seek(begins)
        return b"".join(deque(log, maxlen=lines)).decode(errors="replace").rstrip()
