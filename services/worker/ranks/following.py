"""The thread of a following rank: passes while rank 0 tells some, then the end of the process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from stoker import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.ranks.load_rank import LoadedFollower


def start_following(rank: LoadedFollower, on_end: Callable[[], None]) -> None:
    """Follow rank 0 in a thread of its own.

    Args:
        rank: Handed over.
        on_end: Called in that thread when rank 0 has gone, or this rank can't go on: nothing is left to do.
    """

    def run() -> None:
        try:
            rank.follower.follow(rank.orders.orders())
            log.get().info("rank.left", reason="rank 0 has gone")
        except Exception as error:  # noqa: BLE001 - the boundary of this thread: the process ends with it
            log.get().error("rank.failed", exc_info=error)
        finally:
            rank.orders.close()
            on_end()

    threading.Thread(target=run, name="stoker-engine", daemon=True).start()
