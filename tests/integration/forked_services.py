"""Services in processes of their own, without the second or two of processor time that each takes to import.

One process per service imports it once, and forks; what runs in the child is `python -m services.<name>`,
with the environment and the log that it would have. Between the two stands a keeper, which reports its end.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[2]
_NUMBER = struct.Struct("<i")

_FORKING = """
import importlib, json, os, runpy, signal, socket, struct, sys

service, channel = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
importlib.import_module(f"{service}.__main__")
del sys.modules[f"{service}.__main__"]  # each child runs it
channel.send(b"ready")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers need nobody to wait for them
while True:
    asked, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 2)
    if not asked:
        break
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        channel.close()
        log, reply = descriptors
        child = os.fork()
        if child == 0:
            os.close(reply)
            os.dup2(log, 2)
            os.close(log)
            os.environ.clear()
            os.environ.update(json.loads(asked))
            sys.argv = [service]
            runpy.run_module(service, run_name="__main__", alter_sys=True)
            break
        os.close(log)
        os.write(reply, struct.pack("<i", child))
        _, status = os.waitpid(child, 0)
        os.write(reply, struct.pack("<i", os.waitstatus_to_exitcode(status)))
        os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
"""


class ForkedProcess:
    """One of them, as `subprocess.Popen` would show it.

    Args:
        reply: Where its keeper says its process id, and its exit status once it has ended.
        name: For messages.
    """

    def __init__(self, reply: socket.socket, name: str) -> None:
        self._reply, self._name = reply, name
        self.returncode: int | None = None
        (self.pid,) = _NUMBER.unpack(reply.recv(_NUMBER.size))

    def poll(self) -> int | None:
        """Return its exit status, negative for a signal's; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit status once it has ended; raises `TimeoutExpired`, seconds."""
        if self.returncode is None:
            self._reply.settimeout(timeout)
            try:
                (self.returncode,) = _NUMBER.unpack(self._reply.recv(_NUMBER.size))
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(self._name, timeout or 0.0) from None
            self._reply.close()
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it as a crash would."""
        self.send_signal(signal.SIGKILL)


def fork(service: str, *, environment: Mapping[str, str], stderr: IO[bytes]) -> ForkedProcess:
    """Start `python -m` of a service.

    Args:
        service: Its package, as "services.store".
        environment: All of it.
        stderr: Where its log goes.
    """
    ours, its = socket.socketpair()
    with its:
        asked = json.dumps(dict(environment)).encode()
        socket.send_fds(_server(service), [asked], [stderr.fileno(), its.fileno()])
    return ForkedProcess(ours, service)


@cache
def _server(service: str) -> socket.socket:
    """Return the channel to the process that has a service imported; it ends with this one."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        server = subprocess.Popen(
            [sys.executable, "-c", _FORKING, service, str(its.fileno())],
            env={name: value for name, value in os.environ.items() if not name.startswith("STOKER_")},
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=REPOSITORY,
        )
    assert ours.recv(16) == b"ready", f"{service} cannot be imported"
    atexit.register(_end, server, ours)
    return ours


def _end(server: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    server.wait()
