"""Answers a peer's requests for chunks: blocking, a thread per data connection."""

from __future__ import annotations

import os
import socket
import time

from services.store.peers import metrics
from services.store.peers.arriving import Arriving
from services.store.peers.exchange import Exchange, raw_digest
from services.store.peers.limits import Limits
from services.store.peers.shared_file import Borrowed, DiskCopy
from services.store.peers.sockets import receive_blocking, send_all, send_blocking
from services.store.peers.wire import Arriving as OnItsWay
from services.store.peers.wire import Chunk, Part, Refused, Request, Whole
from stoker import log
from stoker.checkpoint.folder import open_regular
from stoker.errors import PeerError, StokerError

_NO_DIGEST = bytes(16)
_SIGNS_PER_STALL = 4


class Sender:
    """One data connection, until it ends."""

    def __init__(self, connection: socket.socket, exchange: Exchange, limits: Limits) -> None:
        """Args: connection: greeted; closed at the end. exchange: what may be sent."""
        self._connection = connection
        self._exchange = exchange
        self._limits = limits

    def run(self) -> None:
        """Answer until the peer hangs up, asks nothing for too long, or speaks nonsense."""
        with self._connection:
            try:
                while True:
                    self._answer(self._request())
            except (OSError, PeerError) as error:  # its end, or its fault
                log.get().debug("peer.data_ended", message=str(error))

    def _request(self) -> Request:
        idle_seconds = self._limits.idle_seconds
        request = receive_blocking(
            self._connection, until_seconds=time.monotonic() + idle_seconds, stall_seconds=idle_seconds
        )
        if not isinstance(request, Request):
            raise PeerError(f"a {type(request).__name__} instead of a request for a chunk")
        return request

    def _answer(self, request: Request) -> None:
        with self._exchange.borrow(request.file_id, request.index) as chunk:
            if chunk is None:
                metrics.REFUSED.labels(reason="not_here").inc()
                self._refuse("it is not here any more")
            elif chunk.arriving is not None:
                self._send_on(request, chunk.arriving)
            elif chunk.memory is not None:
                self._send_memory(request, chunk.memory)
            elif chunk.copy is not None:
                self._send_file(request, chunk, chunk.copy)

    def _send_memory(self, request: Request, memory: memoryview) -> None:
        digest = _NO_DIGEST
        if request.want_digest:
            digest = self._exchange.digest_of(request.file_id, request.index, memory)
        self._send(memory, digest)

    def _send_on(self, request: Request, arriving: Arriving) -> None:
        """Send a chunk's bytes as they come in; the fetch's own deadlines bound how long that may take."""
        memory = arriving.memory
        send_blocking(self._connection, OnItsWay(length=len(memory)))
        sent = 0
        while True:
            ready, whole = arriving.after(sent, seconds=self._limits.stall_seconds / _SIGNS_PER_STALL)
            if whole is False:
                self._refuse("its fetch failed here")
                return
            if ready > sent or whole is None:
                self._send_part(memory[sent:ready])
                sent = ready
            if whole and sent == len(memory):
                break
        digest = _NO_DIGEST
        if request.want_digest:
            digest = self._exchange.digest_of(request.file_id, request.index, memory)
        send_blocking(self._connection, Whole(digest=digest))

    def _send_part(self, memory: memoryview) -> None:
        send_blocking(self._connection, Part(length=len(memory)))
        send_all(
            self._connection,
            memory,
            until_seconds=self._until(len(memory)),
            stall_seconds=self._limits.stall_seconds,
        )
        metrics.SENT_BYTES.inc(len(memory))

    def _send(self, memory: memoryview, digest: bytes) -> None:
        send_blocking(self._connection, Chunk(length=len(memory), digest=digest))
        send_all(
            self._connection,
            memory,
            until_seconds=self._until(len(memory)),
            stall_seconds=self._limits.stall_seconds,
        )
        metrics.SENT_BYTES.inc(len(memory))

    def _send_file(self, request: Request, chunk: Borrowed, copy: DiskCopy) -> None:
        try:
            descriptor = open_regular(copy.locate())
        except (OSError, StokerError) as error:
            self._refuse(f"its file on disk cannot be read: {error}")
            return
        try:
            if os.fstat(descriptor).st_size < chunk.offset + chunk.length:
                self._refuse("its file on disk has become shorter")
            elif request.want_digest:  # read once, so that what is reckoned is what is sent
                data = os.pread(descriptor, chunk.length, chunk.offset)
                if len(data) != chunk.length:
                    self._refuse("its file on disk has become shorter")
                else:
                    self._send(memoryview(data), raw_digest(data))
            else:
                self._sendfile(descriptor, chunk)
        finally:
            os.close(descriptor)

    def _sendfile(self, descriptor: int, chunk: Borrowed) -> None:
        send_blocking(self._connection, Chunk(length=chunk.length, digest=_NO_DIGEST))
        with os.fdopen(os.dup(descriptor), "rb") as file:
            self._connection.settimeout(self._limits.stall_seconds)
            sent = self._connection.sendfile(file, chunk.offset, chunk.length)
        if sent != chunk.length:
            raise PeerError("its file on disk ended while it was sent")
        metrics.SENT_BYTES.inc(sent)

    def _until(self, byte_count: int) -> float:
        limits = self._limits
        return time.monotonic() + max(limits.stall_seconds, 2 * byte_count / limits.slowest_bytes_per_second)

    def _refuse(self, reason: str) -> None:
        send_blocking(self._connection, Refused(reason=reason))
