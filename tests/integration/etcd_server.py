"""A real etcd for tests, on free ports of the loopback interface, with its data in a folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from stoker.cli.free_ports import free_ports

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

START_SECONDS = 30
INSTALL = "apt-get install -y etcd-server"


class EtcdServer:
    """One etcd process that can be killed, paused and started again on the same data and ports.

    Args:
        folder: For data, log and certificates; exists.
        name: Of the member in its cluster.
        tls: Serve clients over mutual TLS, with certificates made in the folder.
    """

    def __init__(self, folder: Path, *, name: str = "default", tls: bool = False) -> None:
        self.folder = folder
        self.name = name
        self.tls = tls
        self._client_port, self._peer_port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return f"127.0.0.1:{self._client_port}"

    @property
    def peer_url(self) -> str:
        """Where the other members connect."""
        return f"http://127.0.0.1:{self._peer_port}"

    def start(self) -> None:
        """Start it as a cluster of its own and wait until it answers."""
        self.launch([self])
        self.wait_until_ready()

    def launch(self, cluster: Sequence[EtcdServer]) -> None:
        """Start it as a member of a cluster, and wait for nothing."""
        client = f"{'https' if self.tls else 'http'}://{self.endpoint}"
        arguments = [
            f"--name={self.name}",
            f"--data-dir={self.folder / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={self.peer_url}",
            f"--initial-advertise-peer-urls={self.peer_url}",
            f"--initial-cluster={','.join(f'{member.name}={member.peer_url}' for member in cluster)}",
        ]
        if self.tls:
            make_certificates(self.folder)
            arguments += [
                f"--cert-file={self.folder / 'cert.pem'}",
                f"--key-file={self.folder / 'key.pem'}",
                f"--trusted-ca-file={self.folder / 'ca.pem'}",
                "--client-cert-auth",
            ]
        with (self.folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [etcd_binary(), *arguments], stdout=log, stderr=subprocess.STDOUT
            )

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

    def wait_until_ready(self) -> None:
        """Wait for its gRPC port; it opens once there is a leader."""
        options = [("grpc.max_reconnect_backoff_ms", 100), ("grpc.use_local_subchannel_pool", 1)]
        with (
            grpc.secure_channel(self.endpoint, self._credentials(), options)
            if self.tls
            else grpc.insecure_channel(self.endpoint, options)
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

    def _credentials(self) -> grpc.ChannelCredentials:
        ca, key, cert = ((self.folder / name).read_bytes() for name in ("ca.pem", "key.pem", "cert.pem"))
        return grpc.ssl_channel_credentials(ca, key, cert)


def make_certificates(folder: Path) -> None:
    """Make `ca.pem`, and `cert.pem` with `key.pem` signed by it, for server and client on the loopback."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    openssl("req", "-x509", *new_key, "-subj", "/CN=test ca", "-keyout", "ca.key", "-out", "ca.pem")
    openssl("req", "-new", *new_key[:-2], "-subj", "/CN=test", "-keyout", "key.pem", "-out", "request.pem")
    openssl(
        *("x509", "-req", "-in", "request.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-days", "2", "-extfile", "names", "-out", "cert.pem"),
    )


def etcd_binary() -> str:
    """Return the path of etcd; fail with the way to get it where there is none."""
    found = shutil.which("etcd")
    if found is None:
        pytest.fail(f"etcd is not installed, and these tests need a real one: {INSTALL}", pytrace=False)
    return found


@contextmanager
def etcd_server(*, tls: bool = False) -> Generator[EtcdServer, None, None]:
    """Run an etcd while the block runs; nothing of it stays."""
    with tempfile.TemporaryDirectory(prefix="stoker-etcd-") as folder:
        server = EtcdServer(Path(folder), tls=tls)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@contextmanager
def etcd_cluster(size: int = 3) -> Generator[list[EtcdServer], None, None]:
    """Run a cluster while the block runs; nothing of it stays."""
    with tempfile.TemporaryDirectory(prefix="stoker-etcd-") as folder:
        members = []
        try:
            for number in range(size):
                place = Path(folder) / f"m{number}"
                place.mkdir()
                members.append(EtcdServer(place, name=place.name))
            for member in members:
                member.launch(members)
            for member in members:
                member.wait_until_ready()
            yield members
        finally:
            for member in members:
                member.kill()
