"""The HTTP server: uvicorn inside the service's own lifecycle."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from stoker.errors import ConfigError

BACKLOG = 1024
ABANDON_SECONDS = 2
"""How long requests that outlived the drain may take to notice that they are cancelled."""


class _Server(uvicorn.Server):
    """Leaves signals to the service."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves an application on one address.

    Args:
        app: The application.
        address: `host:port`; port 0 = any free one.

    Raises:
        ConfigError: The address is not one, is taken or not ours.
    """

    def __init__(self, app: ASGIApp, address: str) -> None:
        self._socket = _listen(address)
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=ABANDON_SECONDS,
            timeout_keep_alive=75,
        )
        self._server = _Server(config)

    @property
    def address(self) -> str:
        """Return `host:port` as bound."""
        host, port = self._socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def run(self) -> None:
        """Serve until `close`."""
        await self._server.serve(sockets=[self._socket])

    async def close(self, running: asyncio.Task[None] | None) -> None:
        """Stop listening and return when connections are closed.

        Args:
            running: The task that runs `run`; None when it never did.
        """
        if running is None:
            self._socket.close()
            return
        self._server.should_exit = True
        await asyncio.wait([running])


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal():
        raise ConfigError(f"{address!r} is not an address; write host:port, e.g. 127.0.0.1:8000")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {address}: {error}; is the port taken by another program?"
        ) from error
    return listener
