"""Connections that come in: served side by side, and none is left open whenever the end comes."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from stoker import accepting
from stoker.accepting import serve_connections
from stoker.tcp import Address, dial, listen

LIMIT_SECONDS = 60


class Listener:
    """A listener that does something before it accepts."""

    def __init__(self) -> None:
        self._socket = listen(("127.0.0.1", 0), backlog=8)
        self.address: Address = self._socket.getsockname()
        self.before: Callable[[], None] = lambda: None

    def fileno(self) -> int:
        """See `socket.socket`."""
        return self._socket.fileno()

    def accept(self) -> tuple[socket.socket, Any]:
        """See `socket.socket`."""
        self.before()
        return self._socket.accept()

    def close(self) -> None:
        """See `socket.socket`."""
        self._socket.close()


@asynccontextmanager
async def serving(listener: Listener) -> AsyncIterator[asyncio.Task[None]]:
    """Echo what comes, with the host that it comes from before it."""

    async def echo(connection: socket.socket, host: str) -> None:
        loop = asyncio.get_running_loop()
        with connection:
            while data := await loop.sock_recv(connection, 64):
                await loop.sock_sendall(connection, host.encode() + b" " + data)

    server: asyncio.Task[None] = asyncio.create_task(serve_connections(listener, echo, name="echo"))  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.cancel()
        await asyncio.wait([server])
        listener.close()


async def said(connection: socket.socket, data: bytes = b"") -> bytes:
    """Say something, unless it is nothing; return what comes back, nothing at the end."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(LIMIT_SECONDS):
        if data:
            await loop.sock_sendall(connection, data)
        return await loop.sock_recv(connection, 64)


async def test_a_connection_waits_for_no_other_and_ends_with_the_server() -> None:
    listener = Listener()
    async with serving(listener):
        first, second = await dial(listener.address), await dial(listener.address)
        assert await said(second, b"two") == b"127.0.0.1 two"
        assert await said(first, b"one") == b"127.0.0.1 one"

    with first, second:
        assert [await said(first), await said(second)] == [b"", b""]


async def test_a_connection_that_comes_in_as_the_server_ends_is_closed() -> None:
    listener = Listener()
    async with serving(listener) as server:
        listener.before = server.cancel  # its task is made, and cancelled before it begins
        with await dial(listener.address) as connection:
            assert await said(connection) == b""


async def test_a_system_that_gives_no_connection_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepting, "PAUSE_SECONDS", 0.0)
    listener, refused = Listener(), []

    def refuse() -> None:
        listener.before = lambda: None
        refused.append(OSError(errno.EMFILE, "Too many open files"))
        raise refused[0]

    listener.before = refuse
    async with serving(listener):
        with await dial(listener.address) as connection:
            assert await said(connection, b"one") == b"127.0.0.1 one"

    assert refused
