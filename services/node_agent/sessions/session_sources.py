"""What a session's call takes its events from, without waiting: whoever asks is told when there is news.

A session of this node's is asked directly, so that a token passes from the worker's socket to the gateway's
in one go; one that outlives its reader is followed by a task.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from services.node_agent.sessions.awaited_start import AwaitedStart
from services.node_agent.sessions.move_watch import MoveWatch, Round
from services.node_agent.sessions.relay import RelayedSession, SessionRelay
from stoker import log
from stoker.errors import StokerError
from stoker.rpc import own_error
from stoker.v1.session_pb2 import GenerateEvent, GenerateRequest

OnNews = Callable[[], None]
"""Called in the event loop when `Source.poll` may have something; it may close the source."""


class Source(Protocol):
    """One call's events."""

    def poll(self) -> GenerateEvent | None:
        """Return the next event; None = not yet. The last one carries a finish reason.

        Raises:
            StokerError: The session ended without a finish; earlier events were returned first.
        """
        ...

    def close(self) -> None:
        """Leave the session: it ends, unless it outlives its reader."""
        ...


OpenSource = Callable[[GenerateRequest, OnNews], Source]
"""Begins a session; raises StokerError when it is refused."""


class SessionHost(Protocol):
    """The replicas of this node, as far as sessions need them; see `Host`."""

    moves: MoveWatch

    def admit(self, request: GenerateRequest) -> SessionRelay:
        """Return the relay that may open a session."""
        ...

    def generate_kept(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent]:
        """Run a session that outlives its reader."""
        ...

    def awaited_start(self, replica_id: str) -> AwaitedStart:
        """Return a watch on a replica's start."""
        ...


def open_source(host: SessionHost, request: GenerateRequest, on_news: OnNews) -> Source:
    """Begin a session on a replica of this node; raises StokerError when it is refused."""
    if request.keep_seconds > 0:
        return FollowedSource(host.generate_kept(request), Watch(host, request), on_news, request)
    return RelayedSource(host, request, on_news)


class Watch:
    """What every event of a session passes."""

    __slots__ = ("_arriving", "_start")

    def __init__(self, host: SessionHost, request: GenerateRequest) -> None:
        self._start = host.awaited_start(request.replica_id)
        self._arriving: Round = host.moves.round(request)

    def saw(self, event: GenerateEvent) -> None:
        """Take note of an event, and add to it what only the agent knows."""
        self._start.add_to(event)
        self._arriving.saw(event)


class RelayedSource:
    """A session that ends with its reader.

    Args:
        host: The replicas.
        request: The session.
        on_news: See `OnNews`.

    Raises:
        StokerError: It is refused.
    """

    __slots__ = ("_relay", "_session", "_watch")

    def __init__(self, host: SessionHost, request: GenerateRequest, on_news: OnNews) -> None:
        self._relay = host.admit(request)
        self._session: RelayedSession = self._relay.open(request)
        self._session.follow(on_news)
        self._watch = Watch(host, request)

    def poll(self) -> GenerateEvent | None:
        """See `Source`."""
        event = self._session.poll()
        if event is not None:
            self._watch.saw(event)
        return event

    def close(self) -> None:
        """See `Source`."""
        self._relay.close(self._session)


class FollowedSource:
    """Events that a task reads, one ahead of who polls.

    Args:
        events: Closed with this.
        watch: What they pass; None = nothing.
        on_news: See `OnNews`.
        request: For logs.
    """

    def __init__(
        self,
        events: AsyncGenerator[GenerateEvent],
        watch: Watch | None,
        on_news: OnNews,
        request: GenerateRequest,
    ) -> None:
        self._events = events
        self._watch = watch
        self._on_news = on_news
        self._next: GenerateEvent | None = None
        self._error: StokerError | None = None
        self._taken = asyncio.Event()
        self._task = asyncio.create_task(self._follow(request), name=f"follow {request.session_id}")

    def poll(self) -> GenerateEvent | None:
        """See `Source`."""
        event, self._next = self._next, None
        if event is not None:
            self._taken.set()
        elif self._error is not None:
            raise self._error
        return event

    def close(self) -> None:
        """See `Source`."""
        self._task.cancel()

    async def _follow(self, request: GenerateRequest) -> None:
        with log.bind(request_id=request.request_id, session_id=request.session_id):
            try:
                async with aclosing(self._events):
                    async for event in self._events:
                        if self._watch is not None:
                            self._watch.saw(event)
                        self._taken.clear()
                        self._next = event
                        self._on_news()
                        await self._taken.wait()
            except Exception as error:  # noqa: BLE001 - a task boundary: the reader is told
                self._error = own_error(error, "following a session")
                self._on_news()
