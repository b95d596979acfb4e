"""`stoker up` as a user runs it: a process, its URL, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from openai import OpenAI

from stoker.client import Client
from stoker.client.connection import LocalCluster, cluster_file

STOKER = (sys.executable, "-m", "stoker.cli.main")
START_SECONDS = 90


@dataclass(slots=True)
class StokerUp:
    """A running `stoker up`."""

    data_dir: Path
    process: subprocess.Popen[str]
    cluster: LocalCluster
    tree: list[psutil.Process] = field(default_factory=list)

    def openai(self) -> OpenAI:
        """Return the official client, without retries: a test sees each failure."""
        return OpenAI(base_url=f"{self.cluster.rest_url}/v1", api_key="none", max_retries=0, timeout=120)

    def client(self) -> Client:
        """Return Stoker's own client."""
        return Client(gateway=self.cluster.gateway, controller=self.cluster.controller)

    def service(self, name: str) -> psutil.Process:
        """Return the process of a service that runs now."""
        for child in psutil.Process(self.process.pid).children():
            if f"services.{name}" in child.cmdline():
                return child
        raise AssertionError(f"no {name} runs")

    def everything(self) -> list[psutil.Process]:
        """Return all processes of the cluster, workers included, as of now."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def log_events(self, service: str, event: str) -> list[dict]:
        """Return the log lines of a service that carry this event."""
        lines = (self.data_dir / "logs" / f"{service}.log").read_text().splitlines()
        found = (json.loads(line) for line in lines if line.startswith("{"))
        return [line for line in found if line.get("event") == event]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal and return when the process has ended."""
        self.process.send_signal(how)
        self.process.wait(60)


@contextmanager
def stoker_up(data_dir: Path, *arguments: str) -> Iterator[StokerUp]:
    """Run `stoker up` on free ports until the block ends."""
    command = [*STOKER, "up", "--data", str(data_dir), "--port", "0", "--grpc-port", "0", "--pool", "0.75"]
    at_once = ("--set", "node_agent.pool_niceness=0")  # imports do not give way to the tests beside this one
    process = subprocess.Popen(
        [*command, "-o", "json", *at_once, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        if process.stdout.readline() != "{\n":
            raise AssertionError(f"stoker up failed: {process.stderr.read()}")
        cluster = LocalCluster(**json.loads(cluster_file(data_dir).read_text()))
        yield StokerUp(data_dir=data_dir, process=process, cluster=cluster)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
        process.stdout.close()
        process.stderr.close()


def stoker(*arguments: str, data_dir: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command and return what it printed."""
    environment = os.environ | ({"STOKER_HOME": str(data_dir)} if data_dir else {})
    return subprocess.run(
        [*STOKER, *arguments], capture_output=True, text=True, timeout=120, env=environment, check=False
    )


def assert_all_ended(processes: list[psutil.Process], within_seconds: float = 20) -> None:
    """Fail when one of the processes still runs."""
    _, alive = psutil.wait_procs(processes, timeout=within_seconds)
    running = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert running == []


def assert_nothing_listens(cluster: LocalCluster) -> None:
    """Fail when one of the cluster's ports is still taken."""
    urls = (cluster.rest_url.removeprefix("http://"), cluster.gateway, cluster.controller)
    for address in (*urls, cluster.node_agent, cluster.store):
        host, _, port = address.rpartition(":")
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0, f"{address} still answers"
