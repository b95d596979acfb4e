"""Which bytes of a checkpoint under way are on disk and right: a line each, appended once they are durable.

A line is `<crc32> <+|-> <file> <begin> <end>`; a line that is torn or damaged is ignored, so a crash or a
full disk while one is written loses that line only: its bytes are fetched again. Nothing is believed that has
no line.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

JOURNAL_NAME = "stoker-journal"
MAX_JOURNAL_BYTES = 256 * 1024 * 1024
_LINE = re.compile(r"([0-9a-f]{8}) ([+-]) ([A-Za-z0-9][A-Za-z0-9._-]{0,250}) (\d{1,19}) (\d{1,19})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A change of what is there.

    Attributes:
        there: The bytes arrived; False: they were found to be wrong.
        file: Name of the weights file.
        begin: First byte.
        end: One past the last byte.
    """

    there: bool
    file: str
    begin: int
    end: int


def render(entry: Entry) -> bytes:
    """Return the line of an entry; pure."""
    text = f"{'+' if entry.there else '-'} {entry.file} {entry.begin} {entry.end}"
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def parse(content: bytes) -> Iterable[Entry]:
    """Yield the entries whose lines are whole, in order; pure."""
    for line in content.decode("ascii", "replace").split("\n"):
        match = _LINE.fullmatch(line)
        if match is None or zlib.crc32(line[9:].encode("ascii", "replace")) != int(match[1], 16):
            continue
        begin, end = int(match[4]), int(match[5])
        if begin < end:
            yield Entry(there=match[2] == "+", file=match[3], begin=begin, end=end)


class Journal:
    """The file of a checkpoint under way; the caller serialises appends."""

    def __init__(self, directory: int) -> None:
        """Open or make the journal in the folder of the descriptor `directory`.

        Raises:
            OSError: The disk can't.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(JOURNAL_NAME, flags, 0o600, dir_fd=directory)
        self._torn = False

    def entries(self) -> list[Entry]:
        """Return what was noted."""
        size = os.fstat(self._descriptor).st_size
        content = os.pread(self._descriptor, min(size, MAX_JOURNAL_BYTES), 0)
        self._torn = bool(content) and not content.endswith(b"\n")
        return list(parse(content))

    def append(self, entry: Entry) -> None:
        """Note an entry; whoever calls has made its bytes durable before.

        Raises:
            OSError: The disk can't; the entry is not noted, and the next one is not lost with it.
        """
        line = b"\n" * self._torn + render(entry)
        written = os.write(self._descriptor, line)
        self._torn = written < len(line) and (written > 0 or self._torn)
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
