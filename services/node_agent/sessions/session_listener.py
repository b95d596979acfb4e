"""Where gateways connect to for their sessions: each with a ticket that it was given over gRPC.

So whoever may make calls may connect, and nobody else: a ticket is good for one connection, for some seconds.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from stoker import log
from stoker.errors import CapacityError, ConfigError, InvalidRequest, PeerError
from stoker.frames import LENGTH_BYTES
from stoker.tcp import listen, parse_address, send_at_once

TICKET_BYTES = 32
GREET_SECONDS = 5.0
"""A gateway connects, and sends its ticket, within this."""
MAX_STRANGERS = 64
"""Connections whose ticket has not come; more are refused."""
MAX_TICKETS = 1024
"""Given out and not used yet."""
BACKLOG = 128
ACCEPT_PAUSE_SECONDS = 1.0
"""After the system refused a connection, for want of descriptors."""


class Offer:
    """One ticket, and the connection that comes with it. Made by `SessionListener.offer`."""

    def __init__(self, address: str) -> None:
        self.address = address
        """Where to connect to; `:port` = on the host where the call for this was made."""
        self.ticket = secrets.token_bytes(TICKET_BYTES)
        self.connection: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        self._is_taken = False

    async def taken(self) -> socket.socket:
        """Return the connection, the caller's from now on.

        Raises:
            PeerError: None came in time.
        """
        try:
            async with asyncio.timeout(GREET_SECONDS):
                connection = await asyncio.shield(self.connection)
        except TimeoutError:
            raise PeerError(f"no connection for sessions came within {GREET_SECONDS:g} s") from None
        self._is_taken = True
        return connection

    def close(self) -> None:
        """Expect no connection any more, and close one that came and was not taken."""
        if not self.connection.cancel() and not self._is_taken:
            self.connection.result().close()


class SessionListener:
    """Listens for connections and hands each to whom its ticket names.

    Args:
        address: `host:port`; port 0 takes a free one.
        advertised: `host:port` where gateways reach it; empty = on the host where they reach gRPC.

    Raises:
        ConfigError: That cannot be listened on.
    """

    def __init__(self, address: str, advertised: str = "") -> None:
        try:
            self._listener = listen(parse_address(address), backlog=BACKLOG)
        except (OSError, InvalidRequest) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"cannot listen for sessions on {address}: {reason}; set STOKER_NODE_AGENT_SESSION_ADDRESS"
            ) from error
        self.port = self._listener.getsockname()[1]
        self._advertised = advertised or f":{self.port}"
        self._offers: dict[bytes, Offer] = {}
        self._strangers: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def offer(self) -> AsyncIterator[Offer]:
        """Yield a ticket that is good within the block.

        Raises:
            CapacityError: Too many are out.
        """
        if len(self._offers) >= MAX_TICKETS:
            raise CapacityError(
                f"this node agent waits for {MAX_TICKETS} connections, as many as it may",
                retry_after_seconds=GREET_SECONDS,
            )
        offer = Offer(self._advertised)
        self._offers[offer.ticket] = offer
        try:
            yield offer
        finally:
            self._offers.pop(offer.ticket, None)
            offer.close()

    async def run(self) -> None:
        """Take connections until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, _ = await loop.sock_accept(self._listener)
                except OSError as error:
                    log.get().error("sessions.accept_failed", message=str(error))
                    await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                    continue
                self._greet(connection)
        finally:
            for task in self._strangers:
                task.cancel()
            await asyncio.gather(*self._strangers, return_exceptions=True)
            self._listener.close()

    def close(self) -> None:
        """Listen no more; for one that never ran."""
        self._listener.close()

    def _greet(self, connection: socket.socket) -> None:
        if len(self._strangers) >= MAX_STRANGERS:
            connection.close()
            return
        task = asyncio.create_task(self._receive_ticket(connection), name="greet a gateway")
        self._strangers.add(task)
        task.add_done_callback(self._strangers.discard)

    async def _receive_ticket(self, connection: socket.socket) -> None:
        """Hand a connection to whom its first message names, or close it."""
        offer: Offer | None = None
        try:
            connection.setblocking(False)
            send_at_once(connection)
            async with asyncio.timeout(GREET_SECONDS):
                offer = self._offers.pop(await _first_frame(connection), None)
        except (OSError, TimeoutError) as error:
            log.get().info("sessions.stranger_left", message=str(error))
        finally:
            if offer is not None and not offer.connection.done():
                offer.connection.set_result(connection)
            else:
                connection.close()


async def _first_frame(connection: socket.socket) -> bytes:
    """Return the first message if it has a ticket's length, and nothing of what follows it; else nothing."""
    head = await _exactly(connection, LENGTH_BYTES)
    return await _exactly(connection, TICKET_BYTES) if int.from_bytes(head, "little") == TICKET_BYTES else b""


async def _exactly(connection: socket.socket, length: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < length:
        piece = await loop.sock_recv(connection, length - len(data))
        if not piece:
            raise ConnectionResetError("it closed the connection")
        data += piece
    return data
