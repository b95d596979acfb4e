"""Plain sockets: addresses as people write them, connections, and what comes over them."""

from __future__ import annotations

import asyncio
import socket

from stoker.errors import InvalidRequest, PeerError

Address = tuple[str, int]
"""Host and port."""

_MAX_PORT = 65535


class HungUp(PeerError):
    """The other end closed the connection."""


def parse_address(text: str) -> Address:
    """Return host and port of `host:port` or `[v6]:port`.

    Raises:
        InvalidRequest: It is neither.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > _MAX_PORT:
        raise InvalidRequest(f"{text!r} is no address; give host:port")
    return host, int(port)


def listen(address: Address, *, backlog: int) -> socket.socket:
    """Return a socket that listens, and does not block; port 0 takes a free one.

    Raises:
        OSError: The port is taken, or the host not ours.
    """
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listener = socket.create_server(address, family=family, backlog=backlog)
    listener.setblocking(False)
    return listener


async def dial(address: Address) -> socket.socket:
    """Return a connection that does not block or hold small messages back; names are looked up in a thread.

    Raises:
        OSError: It can't be reached.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(*address, type=socket.SOCK_STREAM)
    failure: OSError | None = None
    for family, kind, protocol, _, where in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, where)
            send_at_once(connection)
        except OSError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failure or OSError(f"{address[0]} has no address")


def send_at_once(connection: socket.socket) -> None:
    """Have small messages sent when they are written, not when an earlier one was acknowledged."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def receive_exactly(connection: socket.socket, length: int) -> bytes:
    """Return the next bytes of a connection that does not block, so many.

    Raises:
        HungUp: The other end closed it before.
        OSError: It is broken.
    """
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < length:
        piece = await loop.sock_recv(connection, length - len(data))
        if not piece:
            raise HungUp("the other end closed the connection")
        data += piece
    return bytes(data)
