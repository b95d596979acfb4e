"""What has happened in the cluster, for operators: the last events of a term, and those to come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from stoker.v1 import controller_pb2

MAX_EVENTS = 2_000
DEFAULT_LIMIT = 100


class EventLog:
    """A bounded log; belongs to one event loop. A reader that is too slow sees a gap in the sequence."""

    def __init__(self) -> None:
        self._events: deque[controller_pb2.ClusterEvent] = deque(maxlen=MAX_EVENTS)
        self._sequence = 0
        self._readers: set[asyncio.Event] = set()
        self._ended = False

    def add(self, kind: str, unix_seconds: float, **fields: object) -> None:
        """Append an event and wake its readers."""
        self._sequence += 1
        self._events.append(
            controller_pb2.ClusterEvent(
                sequence=self._sequence,
                unix_seconds=unix_seconds,
                kind=kind,
                fields={key: _text(value) for key, value in fields.items()},
            )
        )
        self._wake()

    def end(self) -> None:
        """Have every reader come to its end: this term is over."""
        self._ended = True
        self._wake()

    async def read(self, limit: int, *, follow: bool) -> AsyncGenerator[controller_pb2.ClusterEvent, None]:
        """Iterate over the last `limit` events (0 = 100), oldest first; with `follow` over later ones too."""
        woken = asyncio.Event()
        self._readers.add(woken)
        try:
            past = list(self._events)[-(limit or DEFAULT_LIMIT) :]
            told = past[0].sequence - 1 if past else self._sequence
            while True:
                woken.clear()
                for event in [event for event in self._events if event.sequence > told]:
                    yield event
                    told = event.sequence
                if not follow or self._ended:
                    return
                if told >= self._sequence:
                    await woken.wait()
        finally:
            self._readers.discard(woken)

    def _wake(self) -> None:
        for reader in self._readers:
            reader.set()


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
