"""The store's pool, page-locked once, when a worker is pre-started: about 0.1 s/GB that no load waits for.

Page-locking belongs to a process, not to a device: the range is registered as portable, so whichever device
the worker's model comes to copies from it directly. It is tried whole, then in segments; where the driver
refuses both, loads go through page-locked buffers, as they do without this (`copy_engine`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from services.worker.weights.copy_engine import Locked
from stoker import log
from stoker.attach.pool import Pool, map_pool
from stoker.errors import StokerError

if TYPE_CHECKING:
    import os

    from services.worker.weights.copy_engine import CopyEngine
    from stoker.attach import Attachment


class LockedPool:
    """The pool's memory, from which a device copies directly; lives as long as the worker.

    Attributes:
        locked: How it came to be page-locked.
        ranges: Addresses that are, each from its first byte to one past its last.
    """

    def __init__(self, pool: Pool, engine: CopyEngine) -> None:
        """Lock it with an engine that stays open; blocks, about 0.1 s/GB."""
        self._pool = pool
        self._engine = engine  # unlocks when it is closed
        self.locked = engine.lock(pool.memory.address, pool.memory.length)
        whole = (pool.memory.address, pool.memory.address + pool.memory.length)
        self.ranges = () if self.locked is Locked.NOT else (whole,)

    def sources(self, attachment: Attachment, file: int, start: int, end: int) -> list[torch.Tensor] | None:
        """Return bytes of a file in locked memory, in pieces; None when they are not in this pool.

        A store that was started anew since has another arena.
        """
        if not self.ranges or not self._pool.holds(attachment):
            return None
        pieces = self._pool.pieces(attachment, file, start, end)
        return [torch.frombuffer(piece, dtype=torch.uint8) for piece in pieces]


def lock_pool(attach_socket: str | os.PathLike[str], engine: CopyEngine) -> LockedPool | None:
    """Page-lock the pool of this host's store; None, with the reason in the log, where that cannot be.

    A worker without it is slower, never wrong: nothing is raised.
    """
    began_seconds = time.monotonic()
    try:
        pool = LockedPool(map_pool(attach_socket), engine)
    except StokerError as error:
        log.get().warning(
            "pool.not_locked",
            reason=error.message,
            action="loads go through page-locked buffers; start the store before the node agent",
        )
        return None
    log.get().info(
        "pool.locked" if pool.ranges else "pool.not_locked",
        how=pool.locked.value,
        byte_count=sum(end - start for start, end in pool.ranges),
        seconds=round(time.monotonic() - began_seconds, 3),
    )
    return pool if pool.ranges else None
