"""The store's whole pool, mapped shared and read-only: for who page-locks it once, before any load.

A checkpoint's own mapping (`Attachment`) is private, so locking it would copy every page; and it comes and
goes with the model. The pool's memory stays, and chunk `k` of a file lies in it where the store put it.
"""

from __future__ import annotations

import os

from stoker.attach.attachment import Attachment
from stoker.attach.connection import Connection
from stoker.attach.memory import Access, MappedRange
from stoker.v1 import checkpoint_store_pb2 as pb


class Pool:
    """A mapping of all chunks; holds no lease, so only an attachment says which of them may be read.

    Attributes:
        memory: The mapping.
        identity: Which arena it is: a store that was started anew has another one.
    """

    def __init__(self, descriptor: int, byte_count: int) -> None:
        """Map it; the caller closes the descriptor."""
        self.memory = MappedRange(byte_count)
        self.memory.map(0, descriptor, 0, byte_count, Access.read_only)
        status = os.fstat(descriptor)
        self.identity = (status.st_dev, status.st_ino)

    def holds(self, attachment: Attachment) -> bool:
        """Tell whether a checkpoint lies in this arena."""
        return attachment.arena == self.identity

    def pieces(self, attachment: Attachment, file: int, start: int, end: int) -> list[memoryview]:
        """Return bytes of a file as they lie in the pool, as few pieces as that takes; nothing is copied.

        The views hold the mapping, not the lease: they are the file's bytes as long as the attachment lives.
        """
        return [self.memory.view(at, length) for at, length in attachment.places(file, start, end)]


def map_pool(socket_path: str | os.PathLike[str], *, timeout_seconds: float = 30.0) -> Pool:
    """Map the pool of the store that listens there; takes addresses, no memory. Blocks for a round trip.

    Raises:
        PeerError: No store answers there.
        DeadlineExceeded: No answer in time.
    """
    connection = Connection(os.fspath(socket_path), timeout_seconds=timeout_seconds)
    request = pb.AttachRequest(pool_only=True)
    shown, descriptors = connection.ask(request, timeout_seconds=timeout_seconds)
    try:
        return Pool(descriptors[0], shown.arena_bytes)
    finally:
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)
