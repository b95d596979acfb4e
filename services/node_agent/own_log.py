"""What the agent itself has logged: found again where its standard error goes into a file."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

from stoker.errors import InvalidRequest, NotFound
from stoker.units import MIB

_TAIL_BYTES = MIB


async def read_own_log(*, tail_lines: int, follow: bool) -> AsyncIterator[str]:
    """Yield the last lines of this process's log file.

    Raises:
        NotFound: Standard error goes to a terminal or a pipe; whoever started the agent has the lines.
        InvalidRequest: Asked to follow: only workers' logs can be followed.
    """
    if follow:
        raise InvalidRequest("the node agent's own log cannot be followed; read its file", param="follow")
    for line in await asyncio.to_thread(_tail, tail_lines):
        yield line


def _tail(tail_lines: int) -> list[str]:
    descriptor = sys.stderr.fileno()
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise NotFound(
            "the node agent logs to a terminal or a pipe: look where it was started (docker compose logs)"
        )
    with Path(f"/proc/self/fd/{descriptor}").open("rb") as log_file:
        size = log_file.seek(0, os.SEEK_END)
        log_file.seek(max(0, size - _TAIL_BYTES))
        lines = deque(log_file.read().splitlines(), maxlen=tail_lines)
    return [line.decode(errors="replace") for line in lines]
