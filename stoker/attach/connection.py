"""The client's end of the attach socket: blocking, one message at a time. The lease lives as long as it."""

from __future__ import annotations

import os
import socket
import time

from stoker.attach import framing
from stoker.errors import BY_CODE, DeadlineExceeded, LoadFailed, PeerError, StokerError
from stoker.v1 import checkpoint_store_pb2 as pb

DESCRIPTORS = 2
"""The arena, then the ready counters."""

_FIRST_BYTES = 32 * 1024
"""Taken with the descriptors: the tables of most models; a larger buffer is mapped anew at every call."""

_LEAST_BYTES, _MOST_BYTES = 4 * 1024, 256 * 1024
"""Taken at a time: messages of progress are short, and large tables are not believed in before they come."""


class Connection:
    """A connected attach socket; closed when nothing refers to it any more, and the lease with it."""

    def __init__(self, socket_path: str, *, timeout_seconds: float) -> None:
        """Connect; blocks.

        Raises:
            PeerError: Nobody listens there.
        """
        self._path = socket_path
        self._received = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(timeout_seconds)
            self._socket.connect(socket_path)
        except OSError as error:
            self._socket.close()
            raise PeerError(
                f"no checkpoint store answers at {socket_path} ({error.strerror or error}); is it running?",
                retry_after_seconds=1.0,
            ) from error

    def close(self) -> None:
        """End the lease."""
        self._socket.close()

    def __del__(self) -> None:
        self._socket.close()  # an explicit close: the interpreter would warn of a socket left open

    def ask(
        self, request: pb.AttachRequest, *, timeout_seconds: float | None
    ) -> tuple[pb.Attached, tuple[int, ...]]:
        """Send the request and return the answer with its two descriptors, which the caller closes.

        Raises:
            StokerError: What the store refused with; PeerError when it went away meanwhile.
        """
        deadline = _deadline(timeout_seconds)
        descriptors: list[int] = []
        try:
            self._send(framing.frame(request), deadline)
            descriptors = self._receive_descriptors(deadline)
            attached = _accepted(self._receive_body(deadline), len(descriptors))
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return attached, tuple(descriptors)

    def next_event(self, *, timeout_seconds: float | None) -> pb.AttachProgress:
        """Return the next progress message; blocks.

        Raises:
            DeadlineExceeded: None came in time; a message that came half-way is kept for the next call.
            LoadFailed: The store went away.
        """
        try:
            return framing.parse(pb.AttachProgress, self._receive_body(_deadline(timeout_seconds)))
        except DeadlineExceeded:
            raise
        except PeerError as error:
            raise LoadFailed(
                f"the checkpoint store went away while it was loading: {error.message}",
                retry_after_seconds=1.0,
            ) from error

    def tell(self, message: pb.AttachConsumed) -> None:
        """Say how far this reader is; blocks for a moment.

        Raises:
            PeerError: The store went away.
        """
        self._send(framing.frame(message), None)

    def _send(self, data: bytes, deadline: float | None) -> None:
        self._limit(deadline)
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._gone(error) from error

    def _receive_descriptors(self, deadline: float | None) -> list[int]:
        """Receive the first bytes of the answer and return the descriptors that came with them."""
        self._limit(deadline)
        try:
            piece, descriptors, _, _ = socket.recv_fds(self._socket, _FIRST_BYTES, DESCRIPTORS)
        except OSError as error:
            raise self._gone(error) from error
        self._received += piece
        return list(descriptors)

    def _receive_body(self, deadline: float | None) -> bytes:
        self._receive_until(framing.LENGTH_BYTES, deadline)
        prefix = bytes(self._received[: framing.LENGTH_BYTES])
        end = framing.LENGTH_BYTES + framing.body_length(prefix, limit_bytes=framing.MAX_REPLY_BYTES)
        self._receive_until(end, deadline)
        body = bytes(self._received[framing.LENGTH_BYTES : end])
        del self._received[:end]
        return body

    def _receive_until(self, length: int, deadline: float | None) -> None:
        while len(self._received) < length:
            self._limit(deadline)
            try:
                missing = length - len(self._received)
                piece = self._socket.recv(min(max(missing, _LEAST_BYTES), _MOST_BYTES))
            except OSError as error:
                raise self._gone(error) from error
            if not piece:
                raise self._gone(None)
            self._received += piece

    def _limit(self, deadline: float | None) -> None:
        left_seconds = None if deadline is None else deadline - time.monotonic()
        if left_seconds is not None and left_seconds <= 0:
            raise self._late()
        self._socket.settimeout(left_seconds)

    def _gone(self, error: OSError | None) -> PeerError:
        if isinstance(error, TimeoutError):
            return self._late()
        reason = "it closed the connection" if error is None else (error.strerror or str(error))
        return PeerError(f"checkpoint store at {self._path}: {reason}", retry_after_seconds=1.0)

    def _late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the checkpoint store at {self._path} did not answer in time")


def _accepted(body: bytes, descriptors: int) -> pb.Attached:
    reply = framing.parse(pb.AttachReply, body)
    if reply.HasField("failed"):
        raise failure(reply.failed)
    if descriptors != DESCRIPTORS:
        raise PeerError(
            f"{descriptors} descriptors came from the store instead of {DESCRIPTORS}; "
            "raise this process's open-file limit (ulimit -n)"
        )
    return reply.attached


def failure(failed: pb.AttachFailed) -> StokerError:
    """Return the error that the store's refusal means."""
    return BY_CODE.get(failed.code, LoadFailed)(failed.message)


def _deadline(timeout_seconds: float | None) -> float | None:
    return None if timeout_seconds is None else time.monotonic() + timeout_seconds
