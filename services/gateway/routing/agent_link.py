"""Sessions at a node agent over one plain connection, beside gRPC (`NodeAgent.LinkSessions`). A shell.

A message and its answer take a third of the time that a gRPC stream needs (decision 0023). The gRPC call
with which the connection began stays open: its pings find an agent that hangs, and the two end together.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from stoker.errors import DeadlineExceeded, PeerError, StokerError
from stoker.frames import FrameLink, Link
from stoker.rpc import MAX_MESSAGE_BYTES, UNREACHABLE, cancelled_after, decode, translated
from stoker.tcp import dial, parse_address
from stoker.v1.session_link_pb2 import (
    LeaveCall,
    LinkNews,
    LinkOrder,
    LinkSessionsEvent,
    LinkSessionsRequest,
)
from stoker.v1.session_pb2 import GenerateEvent, GenerateRequest

if TYPE_CHECKING:
    from stoker.v1.node_agent_pb2_grpc import NodeAgentAsyncStub

Calling = grpc.aio.UnaryStreamCall[Any, Any]

LINK_SECONDS = 10.0
"""Until the agent has taken the connection, or there is none."""


class AgentLink:
    """One connection's calls. Belongs to the event loop; see `stay_linked`.

    Args:
        peer: Who is at the other end, for people.

    Attributes:
        half_window: After so many events that its reader has taken, a call asks for as many more.
    """

    def __init__(self, peer: str) -> None:
        self.half_window = 0
        self._peer = peer
        self._window_events = 0
        self._link: Link | None = None
        self._numbers = itertools.count(1)
        self._calls: dict[int, LinkedCall] = {}

    def open(self, link: Link, window_events: int) -> None:
        """Speak over a link, which brings its frames to `take`.

        Args:
            link: The link.
            window_events: That a call may be ahead of its reader.
        """
        self._link = link
        self._window_events = max(2, window_events)
        self.half_window = self._window_events // 2

    def call(self, order: GenerateRequest, *, timeout_seconds: float) -> LinkedCall | None:
        """Have a session run; None = it has to go another way: the link has ended, or the order is too long.

        Args:
            order: The session.
            timeout_seconds: Longest life of the call.
        """
        number = next(self._numbers)
        body = LinkOrder(call=number, generate=order).SerializeToString()
        if self._link is None or len(body) > MAX_MESSAGE_BYTES:
            return None
        call = self._calls[number] = LinkedCall(self, number, self._peer, self._window_events)
        self._link.send(body)
        call.end_after(timeout_seconds)
        return call

    def take(self, frame: bytes) -> None:
        """Take what the agent sent.

        Raises:
            PeerError: It makes no sense.
        """
        try:
            news = LinkNews.FromString(frame)
        except DecodeError as error:
            raise PeerError(f"a frame of {self._peer} is no news: {error}") from error
        call = self._calls.get(news.call)
        match news.WhichOneof("news"):
            case "event" if call is not None:
                call.put(news.event)
            case "error" if call is not None:
                call.fail(_error(news.error, self._peer))
            case None:
                raise PeerError(f"a frame of {self._peer} is no news that this gateway knows")

    def lose(self, reason: str) -> None:
        """End all calls: nothing comes any more."""
        self._link = None
        for call in self._calls.values():
            call.fail(
                PeerError(f"{self._peer} cannot be reached: {reason}", details={UNREACHABLE: self._peer})
            )

    def give_room(self, number: int) -> None:
        """Let a call's events go on coming: half a window has been read."""
        if self._link is not None:
            self._link.send(LinkOrder(call=number, more=self.half_window).SerializeToString())

    def leave(self, number: int, *, has_ended: bool) -> None:
        """Forget a call; the agent is told unless it has ended there."""
        del self._calls[number]
        if self._link is not None and not has_ended:
            self._link.send(LinkOrder(call=number, leave=LeaveCall()).SerializeToString())


class LinkedCall:
    """One session's events as they come. Made by `AgentLink.call`; `cancel` it in any case."""

    __slots__ = (
        "_error",
        "_events",
        "_has_ended",
        "_is_left",
        "_link",
        "_number",
        "_peer",
        "_taken",
        "_timer",
        "_waiter",
        "_window_events",
    )

    def __init__(self, link: AgentLink, number: int, peer: str, window_events: int) -> None:
        self._link = link
        self._number = number
        self._peer = peer
        self._window_events = window_events
        self._events: deque[GenerateEvent] = deque()
        self._error: StokerError | None = None
        self._has_ended = False
        self._is_left = False
        self._taken = 0
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def next(self) -> GenerateEvent | None:
        """Return the next event; the last one carries a finish reason.

        Raises:
            StokerError: The session ended without a finish; earlier events were returned first.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._taken += 1
        if self._taken == self._link.half_window and not self._has_ended:
            self._taken = 0
            self._link.give_room(self._number)
        return self._events.popleft()

    def cancel(self) -> None:
        """Leave the session, if it has not ended."""
        if self._is_left:
            return
        self._is_left = True
        if self._timer is not None:
            self._timer.cancel()
        self._link.leave(self._number, has_ended=self._has_ended)

    def end_after(self, seconds: float) -> None:
        """Let it live no longer than this from now."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self._pass_deadline)

    def put(self, event: GenerateEvent) -> None:
        """Take an event.

        Raises:
            PeerError: There are more than were asked for.
        """
        if len(self._events) >= self._window_events:
            raise PeerError(f"{self._peer} sent more than {self._window_events} events ahead")
        self._events.append(event)
        self._has_ended = bool(event.finish_reason)
        self._wake()

    def fail(self, error: StokerError) -> None:
        """Take the error with which it ended."""
        self._has_ended = True
        self._error = self._error or error
        self._wake()

    def _pass_deadline(self) -> None:
        if self._error is None:
            self._error = DeadlineExceeded(f"{self._peer} did not answer in time")
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def stay_linked(
    stub: NodeAgentAsyncStub, address: str, peer: str, use: Callable[[AgentLink], None]
) -> None:
    """Connect to an agent, hand the link to `use`, and stay until it has ended; its calls end with it.

    Args:
        stub: The agent's gRPC.
        address: Where that is, `host:port`.
        peer: Who it is, for people.
        use: Called once, when sessions may go over it.

    Raises:
        StokerError: Why there is no link, or none any more.
    """
    calling = stub.LinkSessions(LinkSessionsRequest())
    link = AgentLink(peer)
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    try:
        with translated(peer), cancelled_after(calling):
            offer = await _read(calling, peer)
            with await _connect(offer.offer.address, address, peer) as connection:
                frames = FrameLink(connection, on_frame=link.take, on_end=lost.set_result)
                try:
                    frames.send(offer.offer.ticket)
                    taken = await _read(calling, peer)
                    link.open(frames, taken.taken.window_events)
                    use(link)
                    await _until_gone(calling, lost, peer)
                finally:
                    frames.close()
    except StokerError as error:
        link.lose(error.message)
        raise
    finally:
        link.lose("this gateway stops")


async def _read(calling: Calling, peer: str) -> LinkSessionsEvent:
    """Return the agent's next message.

    Raises:
        PeerError: None came in time, or at all.
    """
    try:
        async with asyncio.timeout(LINK_SECONDS):
            event = await calling.read()
    except TimeoutError:
        raise PeerError(f"{peer} did not go on with linking sessions within {LINK_SECONDS:g} s") from None
    if not isinstance(event, LinkSessionsEvent):
        raise PeerError(f"{peer} ended the link of its sessions")
    return event


async def _connect(offered: str, address: str, peer: str) -> socket.socket:
    """Return a connection to where the agent says; an address without a host is on that of its gRPC.

    Raises:
        StokerError: There is none.
    """
    host, _, _ = address.rpartition(":")
    where = f"{host}{offered}" if offered.startswith(":") else offered
    try:
        async with asyncio.timeout(LINK_SECONDS):
            return await dial(parse_address(where))
    except TimeoutError:
        raise PeerError(f"{peer} takes no sessions at {where}: no answer within {LINK_SECONDS:g} s") from None
    except OSError as error:
        raise PeerError(f"{peer} takes no sessions at {where}: {error}") from error


async def _until_gone(calling: Calling, lost: asyncio.Future[str], peer: str) -> None:
    """Wait until either the call or the connection has ended; always raises."""
    reading = asyncio.ensure_future(calling.read())
    ends: list[asyncio.Future[Any]] = [reading, lost]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise PeerError(lost.result())
        reading.result()
        raise PeerError(f"{peer} ended the link of its sessions")
    finally:
        reading.cancel()
        await asyncio.wait({reading})
        if not reading.cancelled():
            reading.exception()  # looked at: it was raised above, or came just as the connection went


def _error(raw: bytes, peer: str) -> StokerError:
    """Return the error in a message.

    Raises:
        PeerError: There is none in it.
    """
    try:
        return decode(raw)
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(f"an error of {peer} cannot be read: {error}") from error
