"""Where gateways connect to for their sessions: each with a ticket that it was given over gRPC.

So whoever may make calls may connect, and nobody else: a ticket is good for one connection, for some seconds.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.node_agent import metrics
from stoker import log
from stoker.accepting import serve_connections
from stoker.errors import CapacityError, ConfigError, InvalidRequest, PeerError
from stoker.frames import LENGTH_BYTES
from stoker.tcp import listen, parse_address, receive_exactly, send_at_once

TICKET_BYTES = 32
GREET_SECONDS = 5.0
"""A gateway connects, and sends its ticket, within this."""
MAX_STRANGERS = 64
"""Connections whose ticket has not come; more are refused."""
MAX_TICKETS = 1024
"""Given out and not used yet."""
BACKLOG = 128


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
        self._strangers = 0

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
        try:
            await serve_connections(self._listener, self._greet, name="sessions")
        finally:
            self._listener.close()

    def close(self) -> None:
        """Listen no more; for one that never ran."""
        self._listener.close()

    async def _greet(self, connection: socket.socket, host: str) -> None:
        """Hand a connection to whom its first message names, or close it."""
        is_taken = False
        self._strangers += 1
        try:
            offer = await self._announced(connection)
            offer.connection.set_result(connection)
            is_taken = True
        except (OSError, PeerError) as error:
            metrics.REFUSED_STRANGERS.inc()
            log.get().info("session_link.refused", host=host, reason=str(error))
        finally:
            self._strangers -= 1
            if not is_taken:
                connection.close()

    async def _announced(self, connection: socket.socket) -> Offer:
        """Return the offer that a connection's first message names.

        Raises:
            PeerError: It names none, or not in time, or too many wait to be heard.
            OSError: It is gone.
        """
        if self._strangers > MAX_STRANGERS:
            raise PeerError(f"{MAX_STRANGERS} others have not sent their tickets")
        send_at_once(connection)
        try:
            async with asyncio.timeout(GREET_SECONDS):
                ticket = await _first_frame(connection)
        except TimeoutError:
            raise PeerError(f"it sent no ticket within {GREET_SECONDS:g} s") from None
        offer = self._offers.pop(ticket, None)
        if offer is None or offer.connection.done():
            raise PeerError("its ticket is not known, or no longer")
        return offer


async def _first_frame(connection: socket.socket) -> bytes:
    """Return the first message if it has a ticket's length, and nothing of what follows it; else nothing."""
    head = await receive_exactly(connection, LENGTH_BYTES)
    return (
        await receive_exactly(connection, TICKET_BYTES)
        if int.from_bytes(head, "little") == TICKET_BYTES
        else b""
    )
