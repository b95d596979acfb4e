"""The attach socket's framing: each protobuf message after its length, 4 bytes little endian.

The first frame of an answer may carry descriptors (SCM_RIGHTS), which travel with its first byte.
"""

from __future__ import annotations

import struct
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from stoker.errors import PeerError
from stoker.units import MIB

LENGTH_BYTES = 4
MAX_REQUEST_BYTES = 64 * 1024
"""A URI, a revision and a name."""

MAX_REPLY_BYTES = 256 * MIB
"""A table of a million tensors fits."""

M = TypeVar("M", bound=Message)


def frame(message: Message) -> bytes:
    """Return the message as it goes over the socket."""
    return frame_bytes(message.SerializeToString())


def frame_bytes(body: bytes) -> bytes:
    """Return a serialised message as it goes over the socket."""
    return struct.pack("<I", len(body)) + body


def body_length(prefix: bytes, *, limit_bytes: int) -> int:
    """Return the length that a frame's first 4 bytes announce.

    Raises:
        PeerError: It is over the limit: whoever is at the other end speaks another protocol.
    """
    (length,) = struct.unpack("<I", prefix)
    if length > limit_bytes:
        raise PeerError(f"a message of {length} bytes on the attach socket; the limit is {limit_bytes}")
    return int(length)


def parse(kind: type[M], body: bytes) -> M:
    """Return the message in a frame's body.

    Raises:
        PeerError: It is not one.
    """
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise PeerError(f"a frame on the attach socket is no {kind.__name__}: {error}") from error
