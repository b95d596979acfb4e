"""Attach to a checkpoint in the store's memory: ask, receive the descriptors, map."""

from __future__ import annotations

import os
import time
from typing import Literal

from stoker.attach.attachment import Attachment
from stoker.attach.connection import Connection
from stoker.v1 import checkpoint_store_pb2 as pb

_PRIORITIES = {"demand": pb.PRIORITY_DEMAND, "prefetch": pb.PRIORITY_PREFETCH}


def attach(  # noqa: PLR0913 - what a caller may say about one attach
    socket_path: str | os.PathLike[str],
    uri: str,
    *,
    revision: str = "",
    rank: int | None = None,
    holder: str,
    priority: Literal["demand", "prefetch"] = "demand",
    window: bool = False,
    timeout_seconds: float = 30.0,
) -> Attachment:
    """Lease a checkpoint and map it; returns before its bytes are there.

    The store begins to read at once where it must. What `Attachment.wait_ready` says is there may be used
    while the rest still comes. Blocks for a socket round trip (about a millisecond when the store knows the
    checkpoint), so call it in a thread from async code.

    Args:
        socket_path: The store's attach socket, `<run_dir>/attach.sock`.
        uri: An absolute path or `file://`.
        revision: Refuse anything else; empty = whatever is there.
        rank: Which tensor-parallel rank's file; None = the checkpoint is in one piece.
        holder: Who asks, for the store's logs; e.g. a worker id.
        priority: `prefetch` gives way to demand.
        window: Take a checkpoint that is larger than the store's pool through a window: the caller copies its
            bytes away in the order of the files and says so (`Attachment.consumed`).
        timeout_seconds: For connecting and for the store's answer; not for the load.

    Raises:
        PeerError: No store answers there.
        NotFound: No such checkpoint.
        CheckpointInvalid: It is damaged, or its revision is another.
        DoesNotFit: It is larger than the store's pool, and no window was asked for or fits.
        CapacityError: The pool is held by others now; later may work.
        DeadlineExceeded: No answer in time.
    """
    began = time.monotonic()
    connection = Connection(os.fspath(socket_path), timeout_seconds=timeout_seconds)
    connected = time.monotonic()
    request = pb.AttachRequest(
        uri=uri,
        revision=revision,
        holder=holder,
        priority=_PRIORITIES[priority],
        rank=rank,
        window=window,
        columns=True,
    )
    attached, descriptors = connection.ask(request, timeout_seconds=timeout_seconds)
    try:
        return Attachment(
            connection,
            attached,
            descriptors,
            connect_seconds=connected - began,
            reply_seconds=time.monotonic() - connected,
        )
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
