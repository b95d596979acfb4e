"""A real etcd for tests: one member on free ports of the loopback interface, with its data in a folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

START_SECONDS = 30
INSTALL = "apt-get install -y etcd-server"


class EtcdServer:
    """One etcd process that can be killed, paused and started again on the same data and ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._client_port, self._peer_port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self._client_port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        client, peer = f"http://{self.endpoint}", f"http://127.0.0.1:{self._peer_port}"
        with (self.folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    etcd_binary(),
                    f"--data-dir={self.folder / 'data'}",
                    f"--listen-client-urls={client}",
                    f"--advertise-client-urls={client}",
                    f"--listen-peer-urls={peer}",
                    f"--initial-advertise-peer-urls={peer}",
                    f"--initial-cluster=default={peer}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait_until_ready()

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop it where it stands; connections stay open and silent."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _wait_until_ready(self) -> None:
        """Wait for its gRPC port; it opens once there is a leader."""
        with grpc.insecure_channel(
            self.endpoint,
            options=[("grpc.max_reconnect_backoff_ms", 100), ("grpc.use_local_subchannel_pool", 1)],
        ) as channel:
            deadline = time.monotonic() + START_SECONDS
            ready = grpc.channel_ready_future(channel)
            while True:
                try:
                    return ready.result(timeout=0.2)
                except grpc.FutureTimeoutError:
                    assert self._process is not None
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        log = (self.folder / "etcd.log").read_text(errors="replace")[-2000:]
                        pytest.fail(f"etcd did not start:\n{log}")


def etcd_binary() -> str:
    """Return the path of etcd; fail with the way to get it where there is none."""
    found = shutil.which("etcd")
    if found is None:
        pytest.fail(f"etcd is not installed, and these tests need a real one: {INSTALL}", pytrace=False)
    return found


def free_ports(count: int) -> list[int]:
    """Return ports nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@contextmanager
def etcd_server() -> Generator[EtcdServer, None, None]:
    """Run an etcd while the block runs; nothing of it stays."""
    with tempfile.TemporaryDirectory(prefix="stoker-etcd-") as folder:
        server = EtcdServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.kill()
