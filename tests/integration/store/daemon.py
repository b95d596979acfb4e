"""A real store daemon in a process of its own, for tests of whoever talks to one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from stoker.cli.free_ports import free_ports
from stoker.units import MIB
from stoker.v1 import checkpoint_store_pb2_grpc
from tests.integration.forked_services import REPOSITORY, ForkedProcess, fork

START_SECONDS = 60.0
END_SECONDS = 60.0


@dataclass(slots=True, kw_only=True)
class Daemon:
    """A running daemon.

    Attributes:
        process: Its process.
        address: Where its gRPC listens.
        run_dir: Its run folder.
        log: Path of what it logs, JSON lines.
    """

    process: subprocess.Popen[bytes] | ForkedProcess
    address: str
    run_dir: Path
    log: Path

    @property
    def attach_socket(self) -> str:
        """Path for `stoker.attach.attach`."""
        return str(self.run_dir / "attach.sock")

    @contextmanager
    def stub(self) -> Iterator[checkpoint_store_pb2_grpc.CheckpointStoreStub]:
        """A synchronous gRPC stub."""
        with grpc.insecure_channel(self.address) as channel:
            yield checkpoint_store_pb2_grpc.CheckpointStoreStub(channel)

    def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_SECONDS)

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait(END_SECONDS)


def spawn(run_dir: Path, *, address: str = "", prefix: Sequence[str] = (), **settings: object) -> Daemon:
    """Start a daemon without waiting for it; `settings` are those of `StoreSettings`.

    Args:
        run_dir: Made where missing.
        address: Empty = a free port.
        prefix: A command that runs it, e.g. with fewer rights.
        settings: By name.
    """
    address = address or f"127.0.0.1:{free_ports(1)[0]}"
    run_dir.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, object] = {"pool_bytes": 64 * MIB, "drain_seconds": 2.0, "probe_bytes": 0}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STOKER_")}
    for name, value in (defaults | settings | {"address": address, "run_dir": run_dir}).items():
        environment[f"STOKER_STORE_{name.upper()}"] = str(value)
    log = run_dir.parent / f"{run_dir.name}.log"
    process: subprocess.Popen[bytes] | ForkedProcess
    with log.open("ab") as output:
        if prefix:
            command = [*prefix, sys.executable, "-m", "services.store"]
            process = subprocess.Popen(command, env=environment, stderr=output, cwd=REPOSITORY)
        else:
            process = fork("services.store", environment=environment, stderr=output)
    return Daemon(process=process, address=address, run_dir=run_dir, log=log)


def wait_until_ready(daemon: Daemon) -> Daemon:
    """Return once the daemon answers; fails with its log when it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    with grpc.insecure_channel(
        daemon.address,
        options=[("grpc.max_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 20)],
    ) as channel:
        ready = grpc.channel_ready_future(channel)
        while True:
            try:
                ready.result(timeout=0.1)
            except grpc.FutureTimeoutError:
                assert daemon.process.poll() is None, daemon.log.read_text()
                assert time.monotonic() < deadline, daemon.log.read_text()
            else:
                return daemon


@contextmanager
def running(run_dir: Path, *, prefix: Sequence[str] = (), **settings: object) -> Iterator[Daemon]:
    """A daemon that is ready; ended afterwards however the test went."""
    daemon = spawn(run_dir, prefix=prefix, **settings)
    try:
        yield wait_until_ready(daemon)
    finally:
        if daemon.process.poll() is None:
            daemon.kill()


FORKING = """
import os
import sys
from services.store.service import StoreService
from services.store.settings import StoreSettings
from stoker.serving import main

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        main("store", StoreSettings, StoreService)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""
"""Daemons without the second that each takes to import."""


@contextmanager
def forked_daemons(run_dir: Path, **settings: object) -> Iterator[Callable[[], int]]:
    """A function that kills the last daemon, starts the next on `run_dir`, and returns its process id."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STOKER_")}
    for name, value in (settings | {"run_dir": run_dir, "address": f"unix:{run_dir}/grpc.sock"}).items():
        environment[f"STOKER_STORE_{name.upper()}"] = str(value)
    with (run_dir.parent / "log").open("ab") as log:
        parent = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=Path(__file__).parents[3],
        )
    alive: list[int] = []

    def end() -> None:
        for child in alive:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == b"ended\n"
        alive.clear()

    def start() -> int:
        end()
        parent.stdin.write(b"\n")
        parent.stdin.flush()
        alive.append(int(parent.stdout.readline()))
        return alive[0]

    with parent:
        try:
            yield start
        finally:
            end()
            parent.stdin.close()


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A filesystem of its own with little room."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a small filesystem cannot be mounted here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
