"""The thread of a following rank: passes while rank 0 tells some, then the end of the process.

A rank whose weights don't come says so in the answer to its load, and stays until the node agent, which then
ends all ranks, ends this one: were it gone first, rank 0 would report a broken connection in its place.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from stoker import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.ranks.load_rank import LoadedFollower


def start_following(rank: LoadedFollower, on_end: Callable[[], None]) -> threading.Thread:
    """Follow rank 0 in a thread of its own, and return that.

    Args:
        rank: Handed over.
        on_end: Called in that thread when rank 0 has gone, or this rank can't go on: nothing is left to do.
            Not called where that is because its weights don't come.
    """

    def run() -> None:
        try:
            rank.follower.follow(rank.orders.orders())
            log.get().info("rank.left", reason="rank 0 has gone")
        except Exception as error:  # noqa: BLE001 - the boundary of this thread: the process ends with it
            if error is rank.gate.error:
                return
            log.get().error("rank.failed", exc_info=error)
        rank.orders.close()
        on_end()

    thread = threading.Thread(target=run, name="stoker-engine", daemon=True)
    thread.start()
    return thread
