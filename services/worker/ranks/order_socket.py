"""Orders from the first rank to the others, over a unix socket; blocking, in the engine's thread."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from stoker.errors import PeerError
from stoker.frames import FrameReader, framed
from stoker.v1.rank_group_pb2 import RankOrder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

JOIN_SECONDS = 300.0
"""Until the other ranks connect, once all have met: they wait for weights before only where tensors must be
cast or compared as a whole, or the settings say so, and a store reads the files of all ranks in turn."""
_READ_BYTES = 64 * 1024


class OrderSender:
    """Where the first rank listens for the others, and tells them what to do.

    Args:
        path: Of the socket; nothing is there. Gone as soon as all have come.

    Raises:
        PeerError: It can't be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._followers: list[socket.socket] = []
        try:
            self._listener.bind(str(path))
            self._listener.listen()
        except OSError as error:
            self._listener.close()
            raise PeerError(f"the socket {path} for the other ranks cannot be made: {error}") from error

    def accept(self, count: int) -> None:
        """Wait for so many ranks.

        Raises:
            PeerError: They did not come.
        """
        self._listener.settimeout(JOIN_SECONDS)
        try:
            while len(self._followers) < count:
                connection, _ = self._listener.accept()
                connection.settimeout(None)
                self._followers.append(connection)
        except TimeoutError:
            raise PeerError(
                f"{len(self._followers)} of {count} ranks connected to {self._path} within {JOIN_SECONDS:g} s"
            ) from None
        finally:
            self._listener.close()
            self._path.unlink(missing_ok=True)

    def send(self, order: RankOrder) -> None:
        """Tell all ranks.

        Raises:
            PeerError: One of them is gone.
        """
        frame = framed(order.SerializeToString())
        try:
            for follower in self._followers:
                follower.sendall(frame)
        except OSError as error:
            raise PeerError(f"a rank of this replica is gone: {error}") from error

    def close(self) -> None:
        """Say nothing more: the other ranks end."""
        self._listener.close()
        for follower in self._followers:
            follower.close()


class OrderReader:
    """The other end.

    Args:
        path: Of the first rank's socket, which listens already.

    Raises:
        PeerError: It does not.
    """

    def __init__(self, path: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._connection.connect(str(path))
        except OSError as error:
            self._connection.close()
            raise PeerError(f"rank 0 does not listen on {path}: {error}") from error

    def orders(self) -> Iterator[RankOrder]:
        """Yield what comes, until the first rank has gone.

        Raises:
            PeerError: It is no order.
        """
        reader = FrameReader()
        while data := self._receive():
            for frame in reader.feed(data):
                try:
                    order = RankOrder.FromString(bytes(frame))
                except DecodeError as error:
                    raise PeerError(f"a frame of rank 0 is no order: {error}") from error
                yield order

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(_READ_BYTES)
        except ConnectionResetError:
            return b""

    def close(self) -> None:
        """Read no more: the first rank finds this one gone."""
        self._connection.close()
