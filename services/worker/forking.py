"""How a worker is forked so that the node agent, not the process it is forked from, is its parent.

Between the two stands a process that ends at once; its orphan, the worker, goes to the agent, which adopts
the orphans below it (`PR_SET_CHILD_SUBREAPER`). So the agent reaps a forked worker and reads its exit status
like that of any child, the worker dies with the agent, and it outlives the process that it was forked from.

A worker goes on only when the agent says so, and the agent says so once it knows the worker's pid: one that
nobody knows of never lives on.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PACKET_BYTES = 16 * 1024
"""Longest packet: a worker's arguments are a few hundred bytes."""

DESCRIPTORS_PER_WORKER = 2
"""Where its output goes, and where it waits for the word to go on."""


def serve(agent: socket.socket, work: Callable[[Sequence[str]], NoReturn]) -> None:
    """Fork a worker for each request; returns when the agent's end is closed.

    Args:
        agent: This end of the pair.
        work: What a worker does with its arguments; called in the new process.
    """
    while True:
        packet, descriptors, _, _ = socket.recv_fds(agent, PACKET_BYTES, DESCRIPTORS_PER_WORKER)
        if not packet:
            return
        output, go = descriptors
        try:
            answer = {"pid": fork_worker(json.loads(packet), output, go, agent, work)}
        except OSError as error:
            answer = {"errno": error.errno or 0}
        finally:
            os.close(output)
            os.close(go)
        agent.send(json.dumps(answer).encode())


def fork_worker(
    arguments: Sequence[str],
    output: int,
    go: int,
    agent: socket.socket,
    work: Callable[[Sequence[str]], NoReturn],
) -> int:
    """Fork a worker that the agent adopts, and return its pid.

    Args:
        arguments: Of the worker's command line.
        output: Becomes its standard output and error.
        go: It ends unless it can read a byte from here.
        agent: Closed in the worker.
        work: Called there.

    Raises:
        OSError: The kernel makes no more processes.
    """
    told_read, told_write = os.pipe()
    with open(told_read, "rb", buffering=0) as told:  # noqa: PTH123 - a descriptor, not a path
        try:
            between = os.fork()
            if between == 0:
                told.close()
                _fork_and_end(told_write, lambda: _become_worker(arguments, output, go, agent, work))
        finally:
            os.close(told_write)
        os.waitpid(between, 0)  # from here on the worker is the agent's
        words = told.read(64).split()
    if not words:
        raise ChildProcessError("the process between ended early")
    kind, number = words
    if kind == b"errno":
        raise OSError(int(number), os.strerror(int(number)))
    return int(number)


def _fork_and_end(told: int, become: Callable[[], NoReturn]) -> NoReturn:
    """Fork once more, tell the pid or the errno, and end without running anything else of this program."""
    try:
        worker = os.fork()
        if worker == 0:
            os.close(told)
            become()
        os.write(told, b"pid %d" % worker)
    except OSError as error:
        os.write(told, b"errno %d" % (error.errno or 0))
    finally:
        os._exit(0)


def _become_worker(
    arguments: Sequence[str],
    output: int,
    go: int,
    agent: socket.socket,
    work: Callable[[Sequence[str]], NoReturn],
) -> NoReturn:
    """Be as if just started: a session of its own, its own output and title."""
    try:
        os.setsid()
        agent.close()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        if not os.read(go, 1):
            os._exit(1)  # the agent has gone, or has given up on this worker
        os.close(go)
        show_title("stoker-worker", f"python -m services.worker {' '.join(arguments)}")
        reseed()
        sys.argv[1:] = arguments
        work(arguments)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:  # noqa: BLE001 - the task boundary of this process: never back into the server's loop
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(1)


def reseed() -> None:
    """Give this process random numbers of its own where a new process would have them.

    `random` does so by itself, and torch begins every process with the same seed.
    """
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()


def show_title(name: str, title: str) -> None:
    """Show what this process is in `ps` (`title`) and `top` (`name`, 15 bytes)."""
    from setproctitle import setproctitle, setthreadtitle  # noqa: PLC0415 - as all imports here

    setproctitle(title)
    setthreadtitle(name)
