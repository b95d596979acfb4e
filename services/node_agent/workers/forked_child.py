"""A child process that another process forked for this one: followed through a pidfd, reaped here."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from typing import Self

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> bool:
    """Become the parent of all orphans below this process.

    Returns:
        Whether that, and following a process by a descriptor, can be had here: not with old kernels, nor with
        filters of system calls that know neither.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "prctl") or not hasattr(os, "pidfd_open"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def describe_exit(code: int) -> str:
    """Return e.g. `exited with status 1` or `killed by SIGKILL` for a return code as subprocess gives it."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


class ForkedChild:
    """An adopted child, as far as `asyncio.subprocess.Process` is like it. Belongs to the event loop.

    Args:
        pid: Of a child of this process that nobody has reaped.
        stdout: What it prints.
    """

    def __init__(self, pid: int, stdout: asyncio.StreamReader) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._ended = asyncio.Event()
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @classmethod
    async def adopt(cls, pid: int, output: int) -> Self:
        """Return the child of this pid; `output` is the read end of its pipe, and is closed with it.

        Raises:
            ProcessLookupError: This process has no such child.
        """
        stream = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream),
            os.fdopen(output, "rb", buffering=0),
        )
        return cls(pid, stream)

    async def wait(self) -> int:
        """Return its exit status, or a signal's number below zero, once it has ended."""
        await self._ended.wait()
        if self.returncode is None:
            raise AssertionError("it has ended and was reaped")
        return self.returncode

    def send_signal(self, signum: signal.Signals) -> None:
        """Send a signal to the process; nothing happens if it has ended."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._pidfd, signum)

    def _reap(self) -> None:
        """Called when the pidfd became readable: the process has ended."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        os.close(self._pidfd)
        if result is None:
            raise AssertionError("without WNOHANG there is a result")
        exited = result.si_code == os.CLD_EXITED
        self.returncode = result.si_status if exited else -result.si_status
        self._ended.set()
