"""Sessions of one gateway over one plain connection: orders in, events out, each as if a `Generate` call.

A call may send `WINDOW_EVENTS` events ahead of its reader, so that one slow client holds up neither the
others nor this process: what comes beyond waits in the session, which has a bound of its own. Everything
happens in the callback of the socket that brought the news: a token waits for no turn of the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from google.protobuf.message import DecodeError

from services.node_agent.sessions.session_listener import SessionListener
from services.node_agent.sessions.session_sources import OpenSource, Source
from stoker.errors import PeerError
from stoker.frames import FrameLink, Link
from stoker.rpc import encode, own_error
from stoker.v1.session_link_pb2 import LinkNews, LinkOffer, LinkOrder, LinkSessionsEvent, LinkTaken
from stoker.v1.session_pb2 import GenerateRequest

WINDOW_EVENTS = 256
"""That a call may be ahead of its reader: seconds of tokens."""


async def serve_link(listener: SessionListener, open_source: OpenSource) -> AsyncGenerator[LinkSessionsEvent]:
    """Serve one gateway's sessions until its connection or this generator ends; yields what it is told.

    Args:
        listener: Where its connection comes in.
        open_source: Begins sessions.

    Raises:
        StokerError: No connection came, or there are too many.
    """
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with listener.offer() as offer:
        yield LinkSessionsEvent(offer=LinkOffer(address=offer.address, ticket=offer.ticket))
        connection = await offer.taken()
    sessions = LinkedSessions(open_source)
    link = FrameLink(connection, on_frame=sessions.take, on_end=ended.set_result)
    sessions.use(link)
    try:
        yield LinkSessionsEvent(taken=LinkTaken(window_events=WINDOW_EVENTS))
        await ended
    finally:
        link.close()
        sessions.close()


class LinkedSessions:
    """One connection's calls. Belongs to the event loop.

    Args:
        open_source: Begins sessions.
    """

    def __init__(self, open_source: OpenSource) -> None:
        self._open_source = open_source
        self._calls: dict[int, _Call] = {}
        self._link: Link

    def use(self, link: Link) -> None:
        """Speak to the gateway over a link, which brings its frames to `take`."""
        self._link = link

    def close(self) -> None:
        """Leave all sessions: the link has ended."""
        for call in list(self._calls.values()):
            call.end()

    def take(self, frame: bytes) -> None:
        """Do what the gateway wants.

        Raises:
            PeerError: It makes no sense.
        """
        try:
            order = LinkOrder.FromString(frame)
        except DecodeError as error:
            raise PeerError(f"a frame of the gateway is no order: {error}") from error
        call = self._calls.get(order.call)
        match order.WhichOneof("order"):
            case "generate":
                self._begin(order.call, order.generate)
            case "more" if call is not None:
                call.give_room(order.more)
            case "leave" if call is not None:
                call.end()
            case None:
                raise PeerError("an order of the gateway is none that this node agent knows")

    def _begin(self, number: int, request: GenerateRequest) -> None:
        if number in self._calls:
            raise PeerError(f"the gateway has named two calls {number}")
        call = self._calls[number] = _Call(number, self._link, self._calls)
        call.begin(self._open_source, request)


class _Call:
    """One session's events on their way to its reader.

    Args:
        number: Its name on the link.
        link: To the gateway.
        calls: Of that link; it takes itself off when it ends.
    """

    __slots__ = ("_calls", "_link", "_number", "_room", "_session_id", "_source")

    def __init__(self, number: int, link: Link, calls: dict[int, _Call]) -> None:
        self._number = number
        self._link = link
        self._calls = calls
        self._source: Source | None = None
        self._session_id = ""
        self._room = WINDOW_EVENTS

    def begin(self, open_source: OpenSource, request: GenerateRequest) -> None:
        """Run the session; a refusal is the call's one message."""
        self._session_id = request.session_id
        try:
            self._source = open_source(request, self._pass_on)
        except Exception as error:  # noqa: BLE001 - the boundary of a call
            self._fail(error)

    def give_room(self, events: int) -> None:
        """Let so many events more be sent."""
        self._room = min(self._room + events, WINDOW_EVENTS)
        self._pass_on()

    def end(self) -> None:
        """Leave the session, if it has not ended, and the link."""
        if self._calls.get(self._number) is self:
            del self._calls[self._number]
        if self._source is not None:
            source, self._source = self._source, None
            source.close()

    def _pass_on(self) -> None:
        """Send what there is, as far as the reader has room."""
        try:
            while self._source is not None and self._room and (event := self._source.poll()) is not None:
                self._room -= 1
                self._link.send(LinkNews(call=self._number, event=event).SerializeToString())
                if event.finish_reason:
                    self.end()
        except Exception as error:  # noqa: BLE001 - the boundary of a call
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        told = encode(own_error(error, f"session {self._session_id}"))
        self._link.send(LinkNews(call=self._number, error=told).SerializeToString())
        self.end()
