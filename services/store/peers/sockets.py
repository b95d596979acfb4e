"""Frames over sockets: on the event loop for control connections, blocking for chunks."""

from __future__ import annotations

import asyncio
import socket
import time

from services.store.peers.wire import HEAD, Message, body_length, decode, encode
from stoker.tcp import HungUp, receive_exactly


async def send(connection: socket.socket, message: Message) -> None:
    """Send one message."""
    await asyncio.get_running_loop().sock_sendall(connection, encode(message))


async def receive(connection: socket.socket) -> Message:
    """Receive one message.

    Raises:
        PeerError: The other end has hung up or speaks something else.
    """
    head = await receive_exactly(connection, HEAD.size)
    return decode(head, await receive_exactly(connection, body_length(head)))


def send_blocking(connection: socket.socket, message: Message) -> None:
    """Send one message; the socket's timeout bounds it."""
    connection.sendall(encode(message))


def receive_blocking(connection: socket.socket, *, until_seconds: float, stall_seconds: float) -> Message:
    """Receive one message; as `receive`, `recv_all`."""
    head = bytearray(HEAD.size)
    recv_all(connection, memoryview(head), until_seconds=until_seconds, stall_seconds=stall_seconds)
    body = bytearray(body_length(head))
    recv_all(connection, memoryview(body), until_seconds=until_seconds, stall_seconds=stall_seconds)
    return decode(bytes(head), bytes(body))


def recv_all(
    connection: socket.socket, into: memoryview, *, until_seconds: float, stall_seconds: float
) -> None:
    """Fill `into` from a socket, straight from the kernel.

    Args:
        connection: Blocking.
        into: What to fill.
        until_seconds: Monotonic; it must be full by then.
        stall_seconds: Longest time without a byte.

    Raises:
        TimeoutError: It took too long.
        HungUp: The other end has.
    """
    done = 0
    while done < len(into):
        left = until_seconds - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{done:,} of {len(into):,} bytes in the time there was")
        connection.settimeout(min(stall_seconds, left))
        count = connection.recv_into(into[done:])
        if count == 0:
            raise HungUp("the peer hung up")
        done += count


def send_all(
    connection: socket.socket, data: memoryview, *, until_seconds: float, stall_seconds: float
) -> None:
    """Send `data` straight from where it lies; as `recv_all`."""
    done = 0
    while done < len(data):
        left = until_seconds - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{done:,} of {len(data):,} bytes in the time there was")
        connection.settimeout(min(stall_seconds, left))
        done += connection.send(data[done:])
