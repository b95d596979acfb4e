"""Frames between two processes: each message after its length, 4 bytes little endian.

gRPC hands every message to a thread of its own before the event loop sees it, and takes 0.3 to 0.4 ms from
one process to another; a plain socket takes a third of that. `FrameLink` is for the two places where a client
waits for it: tokens between a worker and its node agent, and on to the gateway (decision 0023).
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from stoker.errors import PeerError
from stoker.units import MIB

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 8 * MIB
"""Twice what gRPC lets through, from which these messages come."""

_READ_BYTES = 256 * 1024


def framed(body: bytes) -> bytes:
    """Return a message as it goes over the socket.

    Raises:
        ValueError: It is longer than `MAX_FRAME_BYTES`: the other end would not take it.
    """
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(body)} bytes; at most {MAX_FRAME_BYTES} are allowed")
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take what came; yield the messages that are complete by now.

        Raises:
            PeerError: A length is over the limit: whoever is at the other end speaks another protocol.
        """
        self._bytes += data
        begin = 0
        try:
            while len(self._bytes) - begin >= LENGTH_BYTES:
                body = begin + LENGTH_BYTES
                length = int.from_bytes(self._bytes[begin:body], "little")
                if length > MAX_FRAME_BYTES:
                    raise PeerError(
                        f"a frame of {length} bytes was announced; the limit is {MAX_FRAME_BYTES}"
                    )
                if len(self._bytes) - body < length:
                    return
                begin = body + length
                yield bytes(self._bytes[body:begin])
        finally:
            del self._bytes[:begin]


class Link(Protocol):
    """Where messages for the other end go: a `FrameLink`, or whatever stands for one."""

    def send(self, body: bytes) -> None:
        """Send a message."""
        ...


class FrameLink:
    """One end of a connected socket: sends from any thread, receives in the event loop.

    What the other end does not take at once waits here; how much that may be is the callers' to bound.

    Args:
        connection: The socket, ours from now on.
        on_frame: Takes each message; called in the event loop. An error of its ends the link, for what comes
            after a lost message makes no sense; one that is no PeerError goes on to the loop's handler.
        on_end: Called in the event loop, once, with the reason for people, unless `close` came first.
    """

    def __init__(
        self,
        connection: socket.socket,
        *,
        on_frame: Callable[[bytes], None],
        on_end: Callable[[str], None],
    ) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._on_frame = on_frame
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader()
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._is_open = True
        self._loop.add_reader(connection, self._receive)

    def send(self, body: bytes) -> None:
        """Send a message, at once unless earlier ones wait; nothing happens when the link has ended.

        Raises:
            ValueError: It is too long, see `framed`.
        """
        data = framed(body)
        with self._lock:
            if not self._is_open:
                return
            waits = bool(self._unsent)
            self._unsent += data
            if waits or self._send_unsent():
                return
        self._loop.call_soon_threadsafe(self._await_room)

    def close(self) -> None:
        """End the link; `on_end` is not called. For the event loop."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()

    def _send_unsent(self) -> bool:
        """Send as much as the socket takes; tell whether nothing is left. The lock is held."""
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return False
        except OSError:
            sent = len(self._unsent)  # the other end is gone, which `_receive` tells
        del self._unsent[:sent]
        return not self._unsent

    def _await_room(self) -> None:
        with self._lock:
            if self._is_open and self._unsent:
                self._loop.add_writer(self._socket, self._send_rest)

    def _send_rest(self) -> None:
        with self._lock:
            if self._send_unsent():
                self._loop.remove_writer(self._socket)

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
            if not data:
                self._end("it closed the connection")
                return
            for body in self._reader.feed(data):
                if self._is_open:
                    self._on_frame(body)
        except BlockingIOError:
            return
        except (OSError, PeerError) as error:
            self._end(str(error))
        except Exception as error:
            self._end(f"a message could not be taken: {error!r}")
            raise

    def _end(self, reason: str) -> None:
        if self._is_open:
            self.close()
            self._on_end(reason)
