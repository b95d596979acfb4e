"""Asking peers for chunks: blocking, from reader threads, over connections that are kept."""

from __future__ import annotations

import socket
import threading
import time
from enum import StrEnum

from services.store.peers.exchange import raw_digest
from services.store.peers.limits import Limits
from services.store.peers.sockets import Address, receive_blocking, recv_all, send_blocking
from services.store.peers.wire import Chunk, FileId, Hello, Purpose, Refused, Request, StoreId
from stoker.errors import PeerError

_KEPT_PER_PEER = 4
_NO_DIGEST = bytes(16)
_LEARNING = 0.2
"""Weight of the latest chunk in what chunks usually take."""


class Fault(StrEnum):
    """What is wrong with a peer."""

    DEAD = "dead"
    SLOW = "slow"
    LYING = "lying"
    REFUSED = "refused"


class FetchFailed(PeerError):
    """A peer did not give a chunk."""

    def __init__(self, message: str, fault: Fault) -> None:
        """Args: fault: what is wrong with it."""
        super().__init__(message)
        self.fault = fault


class PeerConnections:
    """Data connections to peers; used from any thread."""

    def __init__(self, me: StoreId, limits: Limits) -> None:
        """Args: me: this store. limits: how long peers may take."""
        self._me = me
        self._limits = limits
        self._lock = threading.Lock()
        self._addresses: dict[StoreId, Address] = {}
        self._kept: dict[StoreId, list[socket.socket]] = {}
        self._usual_seconds_per_byte = 0.0

    def known(self, peer: StoreId, address: Address) -> None:
        """Remember where a peer is."""
        with self._lock:
            self._addresses[peer] = address

    def forget(self, peer: StoreId) -> None:
        """Close what is kept open to a peer."""
        with self._lock:
            self._addresses.pop(peer, None)
            kept = self._kept.pop(peer, [])
        for connection in kept:
            connection.close()

    def close(self) -> None:
        """Forget all peers."""
        for peer in list(self._addresses):
            self.forget(peer)

    def fetch(
        self, peer: StoreId, file_id: FileId, index: int, into: memoryview, *, want_digest: bool
    ) -> None:
        """Fill `into` with a peer's chunk; blocks.

        Args:
            peer: Whom to ask.
            file_id: Of which file.
            index: Which chunk.
            into: As long as the chunk.
            want_digest: Check the bytes against the peer's own digest: the caller has none.

        Raises:
            FetchFailed: Says what is wrong with the peer; `into` may hold anything.
        """
        try:
            connection = self._connection(peer)
        except OSError as error:
            raise FetchFailed(f"cannot be reached: {error.strerror or error}", Fault.DEAD) from error
        try:
            self._fetch(connection, file_id, index, into, want_digest=want_digest)
        except TimeoutError as error:
            connection.close()
            raise FetchFailed(f"chunk {index}: too slow: {error}", Fault.SLOW) from error
        except FetchFailed as error:
            if error.fault is Fault.REFUSED:  # it stays in step
                self._keep(peer, connection)
            else:
                connection.close()
            raise
        except (OSError, PeerError) as error:
            connection.close()
            raise FetchFailed(f"chunk {index}: {error}", Fault.DEAD) from error
        except BaseException:
            connection.close()
            raise
        self._keep(peer, connection)

    def _fetch(
        self, connection: socket.socket, file_id: FileId, index: int, into: memoryview, *, want_digest: bool
    ) -> None:
        began_seconds = time.monotonic()
        until_seconds = began_seconds + self._time_for(len(into))
        stall_seconds = self._limits.stall_seconds
        send_blocking(connection, Request(file_id=file_id, index=index, want_digest=want_digest))
        answer = receive_blocking(connection, until_seconds=until_seconds, stall_seconds=stall_seconds)
        if isinstance(answer, Refused):
            raise FetchFailed(f"chunk {index}: {answer.reason}", Fault.REFUSED)
        if not isinstance(answer, Chunk) or answer.length != len(into):
            raise FetchFailed(f"chunk {index} has {len(into):,} bytes, it sent {answer}", Fault.LYING)
        recv_all(connection, into, until_seconds=until_seconds, stall_seconds=stall_seconds)
        if want_digest and (answer.digest == _NO_DIGEST or raw_digest(into) != answer.digest):
            raise FetchFailed(f"chunk {index} is not what its own digest says", Fault.LYING)
        self._learn((time.monotonic() - began_seconds) / max(1, len(into)))

    def _time_for(self, byte_count: int) -> float:
        limits = self._limits
        longest = max(limits.stall_seconds, byte_count / limits.slowest_bytes_per_second)
        if not self._usual_seconds_per_byte:
            return longest
        usual = self._usual_seconds_per_byte * byte_count
        return min(longest, max(limits.stall_seconds, limits.slow_factor * usual))

    def _learn(self, seconds_per_byte: float) -> None:
        before = self._usual_seconds_per_byte or seconds_per_byte
        self._usual_seconds_per_byte = (1 - _LEARNING) * before + _LEARNING * seconds_per_byte

    def _connection(self, peer: StoreId) -> socket.socket:
        while True:
            with self._lock:
                kept = self._kept.get(peer)
                connection = kept.pop() if kept else None
                address = self._addresses.get(peer)
            if connection is None:
                break
            if _is_open(connection):
                return connection
            connection.close()
        if address is None:
            raise ConnectionError("its link is broken")
        connection = socket.create_connection(address, timeout=self._limits.dial_seconds)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            send_blocking(connection, Hello(purpose=Purpose.DATA, store=self._me, port=0))
            dial_seconds = self._limits.dial_seconds
            greeting = receive_blocking(
                connection, until_seconds=time.monotonic() + dial_seconds, stall_seconds=dial_seconds
            )
        except PeerError as error:
            connection.close()
            raise ConnectionError(error.message) from error
        except BaseException:
            connection.close()
            raise
        if not isinstance(greeting, Hello) or greeting.store != peer:
            connection.close()
            raise ConnectionError(f"another program answers at {address[0]}:{address[1]}: {greeting}")
        return connection

    def _keep(self, peer: StoreId, connection: socket.socket) -> None:
        with self._lock:
            kept = self._kept.setdefault(peer, []) if peer in self._addresses else None
            if kept is not None and len(kept) < _KEPT_PER_PEER:
                kept.append(connection)
                return
        connection.close()


def _is_open(connection: socket.socket) -> bool:
    """Tell whether a kept connection can be used: one that was closed, or has something to say, can't."""
    connection.settimeout(0)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
