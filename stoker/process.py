"""Child processes that never outlive their parent, and the one way to tell whether a pid still lives."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int, how: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send `how` to this process when its parent's spawning thread ends.

    Call first thing in the child. Linux only; elsewhere it does nothing.

    Args:
        parent_pid: Pid of the parent, as the parent told it: catches a parent that died before this call.
        how: Signal the kernel sends.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "prctl"):
        return
    libc.prctl(_PR_SET_PDEATHSIG, int(how), 0, 0, 0)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), how)


def is_alive(pid: int) -> bool:
    """Tell whether a process of this pid exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:  # noqa: PTH123 - /proc is no ordinary file
            state = stat.read().rpartition(b")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in (b"Z", b"X")
