"""Workers on their way give way to nobody any more while an order waits for one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from services.node_agent.workers.fork_server import ForkServer
from services.node_agent.workers.priority import give_way_no_more

AGAIN_SECONDS = 0.25
"""From one look to the next: what imports begins to give way only once it has begun, which may be later than
the order came."""


class Hurry:
    """Takes niceness back, again and again, until no order waits. Belongs to the event loop.

    Args:
        fork_server: Has the imports done of workers to come.
        pids: Of workers that are starting.
        is_needed: Tells whether an order waits for a worker.
    """

    def __init__(
        self, fork_server: ForkServer, *, pids: Callable[[], Iterable[int]], is_needed: Callable[[], bool]
    ) -> None:
        self._fork_server = fork_server
        self._pids = pids
        self._is_needed = is_needed
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Begin, unless it is at it or nothing waits."""
        if self._timer is None:
            self._look()

    def end(self) -> None:
        """End with the agent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if not self._is_needed():
            return
        self._fork_server.hurry()
        for pid in self._pids():
            give_way_no_more(pid)
        self._timer = asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._look)
