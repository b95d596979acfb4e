"""Connections that come in: a task for each, and none that nobody closes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Never

from stoker import log

PAUSE_SECONDS = 1.0
"""After the system gave none, mostly for want of descriptors: those that are there go on and end."""

ServeOne = Callable[[socket.socket, str], Coroutine[Any, Any, None]]
"""Takes a connection, its own from then on, and the host that it comes from; empty: this one."""


async def serve_connections(listener: socket.socket, serve_one: ServeOne, *, name: str) -> Never:
    """Accept connections until cancelled; their tasks are cancelled and awaited then.

    Args:
        listener: Listens, and does not block; stays the caller's.
        serve_one: Serves one, and closes it or hands it on; whatever it raises ends all of them.
        name: Of what is served, for people.
    """
    unbegun: set[socket.socket] = set()  # a task that is cancelled before it begins closes nothing

    async def begin(connection: socket.socket, host: str) -> None:
        unbegun.discard(connection)
        await serve_one(connection, host)

    try:
        async with asyncio.TaskGroup() as group:
            while True:
                await _readable(listener)
                try:
                    # Not `sock_accept`: a cancellation may lose what it has accepted.
                    connection, address = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue  # it has left
                except OSError as error:
                    log.get().error("connection.not_accepted", by=name, message=str(error))
                    await asyncio.sleep(PAUSE_SECONDS)
                    continue
                connection.setblocking(False)
                unbegun.add(connection)
                host = str(address[0]) if isinstance(address, tuple) else ""
                group.create_task(begin(connection, host), name=f"{name} of {host or 'this host'}")
    finally:
        for connection in unbegun:
            connection.close()


async def _readable(listener: socket.socket) -> None:
    """Return when somebody wants to come in."""
    loop = asyncio.get_running_loop()
    someone = loop.create_future()
    loop.add_reader(listener, lambda: None if someone.done() else someone.set_result(None))
    try:
        await someone
    finally:
        loop.remove_reader(listener)
