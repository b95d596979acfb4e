"""Who waits for a change of something on the event loop: a set of events, set together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Changes:
    """Wakes everybody who watches one thing; used from the event loop only."""

    def __init__(self) -> None:
        self._events: set[asyncio.Event] = set()

    @contextmanager
    def watched(self) -> Iterator[asyncio.Event]:
        """Hand out an event that is set at every `tell`; who waits clears it before looking."""
        event = asyncio.Event()
        self._events.add(event)
        try:
            yield event
        finally:
            self._events.discard(event)

    def tell(self) -> None:
        """Wake who watches."""
        for event in self._events:
            event.set()
