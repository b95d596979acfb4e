"""Children that end with their parent, and pids that no longer live; with real processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from stoker.process import is_alive

LIMIT_SECONDS = 60

CHILD = """
import os, signal, sys
from stoker.process import die_with_parent
die_with_parent(int(sys.argv[1]), signal.Signals(int(sys.argv[2])))
print(os.getpid(), flush=True)
signal.pause()
"""

PARENT = f"""
import os, signal, subprocess, sys
subprocess.Popen([sys.executable, "-c", {CHILD!r}, str(os.getpid()), sys.argv[1]])
signal.pause()
"""


def wait_for_end(pidfd: int) -> None:
    """Return when the process behind the descriptor has ended."""
    readable, _, _ = select.select([pidfd], [], [], LIMIT_SECONDS)
    assert readable, "it still runs"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_when_its_parent_is_killed(how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(int(how))], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()

            wait_for_end(child)
        finally:
            os.close(child)


def test_a_child_whose_parent_died_before_it_asked_ends_at_once() -> None:
    """Its parent is told to be another process than the one that runs it."""
    gone = subprocess.run(
        [sys.executable, "-c", CHILD, str(os.getppid()), str(int(signal.SIGKILL))],
        capture_output=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )

    assert (gone.returncode, gone.stdout) == (-signal.SIGKILL, b"")


def test_a_zombie_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended and nobody has reaped it

        assert not is_alive(process.pid)
    finally:
        process.wait()


def test_a_reaped_process_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()

    assert not is_alive(process.pid)


def test_this_process_is_alive() -> None:
    assert is_alive(os.getpid())


def test_a_name_with_brackets_and_spaces_is_no_obstacle() -> None:
    """The kernel shows the name in brackets before the state; a program may choose `a) Z (b`."""
    renamed = (
        "import ctypes, signal; ctypes.CDLL(None).prctl(15, b'a) Z (b', 0, 0, 0);"
        "print('named', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", renamed], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            assert is_alive(process.pid)
        finally:
            process.kill()
