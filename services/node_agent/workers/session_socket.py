"""Where a worker connects to for its sessions: a socket that listens while the worker loads its model."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from stoker.errors import PeerError

SUFFIX = ".run"
"""Of its file, which else has the name of the worker's own socket."""
ACCEPT_SECONDS = 5.0
"""A worker connects before it says that its model is loaded."""


class SessionSocket:
    """A unix socket for one connection; leaving the block closes it and takes its file away.

    Args:
        path: Of the file; nothing is there.

    Raises:
        PeerError: It can't be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.setblocking(False)
        try:
            self._listener.bind(str(path))
            self._listener.listen(1)
        except OSError as error:
            self._listener.close()
            raise PeerError(f"the session socket {path} cannot be made: {error}") from error

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Listen no more."""
        self._listener.close()
        self._path.unlink(missing_ok=True)

    async def accept(self) -> socket.socket:
        """Return the connection.

        Raises:
            PeerError: None came.
        """
        try:
            async with asyncio.timeout(ACCEPT_SECONDS):
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        except TimeoutError:
            raise PeerError(f"nobody connected to {self._path} within {ACCEPT_SECONDS:g} s") from None
        return connection
