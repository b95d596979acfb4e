"""Plays a node agent: has a server without imports fork workers, and prints what became of them, as JSON.

Run as `python -m tests.integration.node_agent.toy_agent`; a process of its own, for it adopts orphans.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from services.node_agent.workers.forked_child import ForkedChild, adopt_orphans
from services.worker.forking import serve
from stoker.process import die_with_parent


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def work(arguments: Sequence[str]) -> NoReturn:
    """Do what the first argument says, in a forked worker."""
    match arguments:
        case ["exit", status]:
            say(f"ended with {status}")
            sys.exit(int(status))
        case ["raise", words]:
            raise RuntimeError(words)
        case ["random"]:
            say(str(random.random()))
            sys.exit(0)
        case ["who"]:
            ids = {"parent": os.getppid(), "group": os.getpgrp(), "session": os.getsid(0), "pid": os.getpid()}
            say(json.dumps(ids))
            sys.exit(0)
        case ["stay", agent_pid]:
            die_with_parent(int(agent_pid))  # as the worker's own main does
    while True:
        signal.pause()


class ToyServer:
    """The server's process, and this end of the pair."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", __spec__.name, "server", str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    async def fork(self, *arguments: str, go: bool = True) -> ForkedChild:
        """Return a new worker, with leave to go on or without."""
        (output_read, output_write), (go_read, go_write) = os.pipe(), os.pipe()
        socket.send_fds(self.channel, [json.dumps(arguments).encode()], [output_write, go_read])
        answer = json.loads(await asyncio.to_thread(self.channel.recv, 4096))
        child = await ForkedChild.adopt(answer["pid"], output_read)
        if go:
            os.write(go_write, b"\n")
        for descriptor in (output_write, go_read, go_write):
            os.close(descriptor)
        return child

    async def outcome(self, *arguments: str, go: bool = True) -> dict[str, Any]:
        """Return how a worker ended and what it printed."""
        child = await self.fork(*arguments, go=go)
        code = await child.wait()
        return {"code": code, "output": (await child.stdout.read()).decode()}


async def agent() -> None:
    """Fork workers of every kind, print what became of them, and wait to be killed."""
    assert adopt_orphans()
    server = ToyServer()
    found: dict[str, Any] = {
        "agent": os.getpid(),
        "exit": await server.outcome("exit", "3"),
        "raise": await server.outcome("raise", "too hot"),
        "who": json.loads((await server.outcome("who"))["output"]),
        "random": [(await server.outcome("random"))["output"] for _ in range(2)],
        "no leave": await server.outcome("exit", "0", go=False),
    }
    killed = await server.fork("stay", str(os.getpid()))
    killed.send_signal(signal.SIGKILL)
    found["killed"] = await killed.wait()
    outlives = await server.fork("stay", str(os.getpid()))
    server.process.kill()
    found["server"] = server.process.wait()
    found["outlives"] = {"pid": outlives.pid, "code": outlives.returncode}
    say(json.dumps(found))
    await outlives.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["server"]:
        serve(socket.socket(fileno=int(sys.argv[2])), work)
    else:
        asyncio.run(agent())
