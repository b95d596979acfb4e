"""A real store daemon in a process of its own, for tests of whoever talks to one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from stoker.units import MIB
from stoker.v1 import checkpoint_store_pb2_grpc

START_SECONDS = 20.0


@dataclass(slots=True, kw_only=True)
class Daemon:
    """A running daemon.

    Attributes:
        process: Its process.
        address: Where its gRPC listens.
        run_dir: Its run folder.
        log: Path of what it logs, JSON lines.
    """

    process: subprocess.Popen[bytes]
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
        return self.process.wait(20)

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait(20)


def spawn(run_dir: Path, *, address: str = "", prefix: Sequence[str] = (), **settings: object) -> Daemon:
    """Start a daemon without waiting for it; `settings` are those of `StoreSettings`.

    Args:
        run_dir: Made where missing.
        address: Empty = a free port.
        prefix: A command that runs it, e.g. with fewer rights.
        settings: By name.
    """
    address = address or f"127.0.0.1:{free_port()}"
    run_dir.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, object] = {"pool_bytes": 64 * MIB, "drain_seconds": 2.0}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STOKER_")}
    for name, value in (defaults | settings | {"address": address, "run_dir": run_dir}).items():
        environment[f"STOKER_STORE_{name.upper()}"] = str(value)
    log = run_dir.parent / f"{run_dir.name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "services.store"],
            env=environment,
            stderr=output,
            cwd=Path(__file__).resolve().parents[3],
        )
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


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
