"""What a worker printed: a file bounded in size, its tail, and whoever follows it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

from stoker import log
from stoker.units import KIB, MIB

MAX_FILE_BYTES = 4 * MIB
"""A log file beyond this becomes `<name>.1`, which replaces the one before: twice this at most per worker."""

MAX_LINE_BYTES = 16 * KIB
"""A longer line is cut into several."""

TAIL_LINES = 1000
"""Lines kept in memory for readers."""

FOLLOWER_LINES = 1000
"""Lines a follower may lag behind before the oldest are left out, with a line that says how many."""


class WorkerLog:
    """Receives a worker's output, in bytes as they come; belongs to the event loop.

    Args:
        path: The file; its folder exists. Appended to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._bytes = self._file.tell()
        self._rest = b""
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._followers: set[_Follower] = set()
        self._ended = False
        self._broken = False

    @property
    def path(self) -> Path:
        """Return the file's path."""
        return self._path

    def write(self, output: bytes) -> None:
        """Take a piece of output. A full disk costs the file, never the worker."""
        self._write_file(output)
        *lines, self._rest = (self._rest + output).split(b"\n")
        while len(self._rest) > MAX_LINE_BYTES:
            lines.append(self._rest[:MAX_LINE_BYTES])
            self._rest = self._rest[MAX_LINE_BYTES:]
        for line in lines:
            self._add_line(line)

    def end(self) -> None:
        """The worker has ended: followers get the rest and stop."""
        if self._ended:
            return
        if self._rest:
            self._add_line(self._rest)
            self._rest = b""
        self._ended = True
        self._file.close()
        for follower in self._followers:
            follower.wake.set()

    async def read(self, *, tail_lines: int, follow: bool) -> AsyncIterator[str]:
        """Yield the last lines, then, if following, each new one until the worker has ended."""
        follower = _Follower()
        follower.lines.extend(list(self._tail)[-tail_lines:])
        self._followers.add(follower)
        try:
            while True:
                if follower.left_out:
                    yield f"[{follower.left_out} lines left out: this reader is too slow]"
                    follower.left_out = 0
                while follower.lines:
                    yield follower.lines.popleft()
                if not follow or self._ended:
                    return
                follower.wake.clear()
                await follower.wake.wait()
        finally:
            self._followers.discard(follower)

    def _add_line(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        self._tail.append(text)
        for follower in self._followers:
            follower.add(text)

    def _write_file(self, output: bytes) -> None:
        if self._broken or self._ended:
            return
        try:
            if self._bytes + len(output) > MAX_FILE_BYTES and self._bytes:
                self._file.close()
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._file = self._path.open("ab", buffering=0)
                self._bytes = 0
            self._file.write(output)
            self._bytes += len(output)
        except OSError as error:
            self._broken = True
            log.get().warning("worker_log.write_failed", path=str(self._path), error=error.strerror)


class _Follower:
    """A reader: what it has not read yet."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque()
        self.wake = asyncio.Event()
        self.left_out = 0

    def add(self, line: str) -> None:
        if len(self.lines) >= FOLLOWER_LINES:
            self.lines.popleft()
            self.left_out += 1
        self.lines.append(line)
        self.wake.set()
