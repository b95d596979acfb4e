"""Asking peers for chunks: blocking, from reader threads, over connections that are kept."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from enum import StrEnum

from services.store.peers.exchange import raw_digest
from services.store.peers.limits import Limits
from services.store.peers.sockets import receive_blocking, recv_all, send_blocking
from services.store.peers.wire import (
    Arriving,
    Chunk,
    FileId,
    Hello,
    Part,
    Purpose,
    Refused,
    Request,
    StoreId,
    Whole,
)
from stoker.errors import PeerError
from stoker.tcp import Address
from stoker.units import KIB

_KEPT_PER_PEER = 4
_TOLD_BYTES = 256 * KIB
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
        self._under_way = 0

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

    def fetch(  # noqa: PLR0913 - what, whence, whereto
        self,
        peer: StoreId,
        file_id: FileId,
        index: int,
        into: memoryview,
        *,
        want_digest: bool,
        told: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Fill `into` with a peer's chunk; blocks.

        Args:
            peer: Whom to ask.
            file_id: Of which file.
            index: Which chunk.
            into: As long as the chunk.
            want_digest: Check the bytes against the peer's own digest: the caller has none.
            told: Told how many bytes are there, as they arrive; must not block.

        Raises:
            FetchFailed: Says what is wrong with the peer; `into` may hold anything.
        """
        try:
            connection = self._connection(peer)
        except OSError as error:
            raise FetchFailed(f"cannot be reached: {error.strerror or error}", Fault.DEAD) from error
        with self._lock:
            self._under_way += 1
        try:
            self._fetch(
                connection, Request(file_id=file_id, index=index, want_digest=want_digest), into, told
            )
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
        finally:
            with self._lock:
                self._under_way -= 1
        self._keep(peer, connection)

    def _fetch(
        self, connection: socket.socket, request: Request, into: memoryview, told: Callable[[int], None]
    ) -> None:
        index = request.index
        began_seconds = time.monotonic()
        until_seconds = began_seconds + self._time_for(len(into))
        stall_seconds = self._limits.stall_seconds
        send_blocking(connection, request)
        answer = receive_blocking(connection, until_seconds=until_seconds, stall_seconds=stall_seconds)
        if isinstance(answer, Refused):
            raise FetchFailed(f"chunk {index}: {answer.reason}", Fault.REFUSED)
        if not isinstance(answer, Chunk | Arriving) or answer.length != len(into):
            raise FetchFailed(f"chunk {index} has {len(into):,} bytes, it sent {answer}", Fault.LYING)
        if isinstance(answer, Arriving):
            digest = self._receive_parts(connection, index, into)
        else:
            digest = answer.digest
            for at in range(0, len(into), _TOLD_BYTES):
                piece = into[at : at + _TOLD_BYTES]
                recv_all(connection, piece, until_seconds=until_seconds, stall_seconds=stall_seconds)
                told(at + len(piece))
            self._learn((time.monotonic() - began_seconds) / max(1, len(into)))
        if request.want_digest and (digest == _NO_DIGEST or raw_digest(into) != digest):
            raise FetchFailed(f"chunk {index} is not what its own digest says", Fault.LYING)

    def _receive_parts(self, connection: socket.socket, index: int, into: memoryview) -> bytes:
        """Take a chunk that the peer is fetching itself; returns its digest there."""
        limits = self._limits
        done, moved_seconds = 0, time.monotonic()
        until_seconds = moved_seconds + limits.arriving_factor * self._longest(len(into))
        while True:
            message = receive_blocking(
                connection, until_seconds=until_seconds, stall_seconds=limits.stall_seconds
            )
            match message:
                case Part(length=0):
                    if time.monotonic() - moved_seconds > limits.pause_seconds:
                        raise TimeoutError(f"it waits for its own source after {done:,} bytes")
                case Part(length=length) if length <= len(into) - done:
                    recv_all(
                        connection,
                        into[done : done + length],
                        until_seconds=until_seconds,
                        stall_seconds=limits.stall_seconds,
                    )
                    done += length
                    moved_seconds = time.monotonic()
                case Whole(digest=digest) if done == len(into):
                    return digest
                case Refused(reason=reason):
                    raise FetchFailed(f"chunk {index}: {reason}", Fault.REFUSED)
                case _:
                    raise FetchFailed(f"chunk {index}: {message} after {done:,} bytes", Fault.LYING)

    def _longest(self, byte_count: int) -> float:
        """Return what a chunk may take at the slowest rate, which all that is under way shares."""
        limits = self._limits
        return max(
            limits.stall_seconds, max(1, self._under_way) * byte_count / limits.slowest_bytes_per_second
        )

    def _time_for(self, byte_count: int) -> float:
        limits = self._limits
        longest = self._longest(byte_count)
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
