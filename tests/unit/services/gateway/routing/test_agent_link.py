"""A gateway's and a node agent's end of one link, joined without a socket; the test plays the sessions."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest

from services.gateway.routing.agent_link import AgentLink, LinkedCall
from services.node_agent.sessions.linked_sessions import WINDOW_EVENTS, LinkedSessions
from services.node_agent.sessions.session_sources import OnNews
from stoker.errors import DeadlineExceeded, Fenced, PeerError, QueueFull, StokerError
from stoker.rpc import MAX_MESSAGE_BYTES, UNREACHABLE
from stoker.v1.session_link_pb2 import LinkNews, LinkOrder
from stoker.v1.session_pb2 import FINISH_REASON_LENGTH, GenerateEvent, GenerateRequest

LONG_SECONDS = 600.0


class PlayedSession:
    """A session of the agent's: says what the test tells it to."""

    def __init__(self, on_news: OnNews) -> None:
        self._on_news = on_news
        self._events: deque[GenerateEvent] = deque()
        self._error: StokerError | None = None
        self.left = False

    def poll(self) -> GenerateEvent | None:
        """See `Source`."""
        if self._events:
            return self._events.popleft()
        if self._error is not None:
            raise self._error
        return None

    def close(self) -> None:
        """See `Source`."""
        self.left = True

    def say(self, position: int, *, finish: bool = False) -> None:
        """Make a token."""
        event = GenerateEvent(position=position)
        if finish:
            event.finish_reason = FINISH_REASON_LENGTH
        self._events.append(event)
        self._on_news()

    def fail(self, error: StokerError) -> None:
        """End with an error."""
        self._error = error
        self._on_news()

    @property
    def waiting(self) -> int:
        """Return the events that nobody has taken."""
        return len(self._events)


class Scene:
    """Both ends. Frames of the agent's pass at once; the gateway's too."""

    def __init__(self) -> None:
        self.sessions: dict[str, PlayedSession] = {}
        self.refusal: Exception | None = None
        self.gateway = AgentLink("node agent n-1")
        self.agent = LinkedSessions(self._open)
        self.agent.use(_Wire(self.gateway.take))
        self.gateway.open(_Wire(self.agent.take), WINDOW_EVENTS)

    def _open(self, request: GenerateRequest, on_news: OnNews) -> PlayedSession:
        if self.refusal is not None:
            raise self.refusal
        played = self.sessions[request.session_id] = PlayedSession(on_news)
        return played

    def call(self, session_id: str, timeout_seconds: float = LONG_SECONDS) -> LinkedCall:
        """Have a session run."""
        call = self.gateway.call(GenerateRequest(session_id=session_id), timeout_seconds=timeout_seconds)
        assert call is not None
        return call


class _Wire:
    def __init__(self, take: object) -> None:
        self.send = take


async def test_each_call_gets_the_events_of_its_session() -> None:
    scene = Scene()
    first, second = scene.call("ses-1"), scene.call("ses-2")
    scene.sessions["ses-2"].say(7)
    scene.sessions["ses-1"].say(3)

    assert [(await call.next()).position for call in (first, second)] == [3, 7]
    first.cancel()
    second.cancel()


async def test_a_session_that_has_finished_is_left_once_and_nothing_follows() -> None:
    scene = Scene()
    call = scene.call("ses-1")
    scene.sessions["ses-1"].say(0, finish=True)

    assert (await call.next()).finish_reason == FINISH_REASON_LENGTH
    call.cancel()
    call.cancel()
    assert scene.sessions["ses-1"].left


async def test_a_reader_that_leaves_ends_the_session() -> None:
    scene = Scene()
    call = scene.call("ses-1")
    scene.sessions["ses-1"].say(0)
    call.cancel()

    assert scene.sessions["ses-1"].left
    scene.sessions["ses-1"].say(1)


async def test_errors_are_the_same_on_both_sides() -> None:
    scene = Scene()
    scene.refusal = QueueFull("replica rep-1 is full", retry_after_seconds=2.0)
    refused = scene.call("ses-1")
    scene.refusal = None
    fails = scene.call("ses-2")
    scene.sessions["ses-2"].say(0)
    scene.sessions["ses-2"].fail(Fenced("taken over", details={"highest_epoch": 7}))

    with pytest.raises(QueueFull, match="rep-1 is full") as full:
        await refused.next()
    assert full.value.retry_after_seconds == 2.0
    assert (await fails.next()).position == 0
    with pytest.raises(Fenced) as fenced:
        await fails.next()
    assert fenced.value.details == {"highest_epoch": 7}
    assert scene.sessions["ses-2"].left


async def test_what_nobody_foresaw_ends_its_call_alone() -> None:
    scene = Scene()
    scene.refusal = RuntimeError("zebra")
    call = scene.call("ses-1")
    scene.refusal = None
    other = scene.call("ses-2")
    scene.sessions["ses-2"].say(0)

    with pytest.raises(StokerError, match="zebra"):
        await call.next()
    assert (await other.next()).position == 0


async def test_a_slow_reader_holds_its_own_session_up_and_no_other() -> None:
    scene = Scene()
    slow, quick = scene.call("slow"), scene.call("quick")
    for position in range(WINDOW_EVENTS + 10):
        scene.sessions["slow"].say(position)
    scene.sessions["quick"].say(0)

    assert scene.sessions["slow"].waiting == 10
    assert (await quick.next()).position == 0
    assert [(await slow.next()).position for _ in range(WINDOW_EVENTS + 10)] == [*range(WINDOW_EVENTS + 10)]
    assert scene.sessions["slow"].waiting == 0


async def test_a_session_ends_when_its_time_is_up() -> None:
    scene = Scene()
    call = scene.call("ses-1", timeout_seconds=0.0)

    with pytest.raises(DeadlineExceeded, match="n-1"):
        await call.next()
    call.cancel()
    assert scene.sessions["ses-1"].left


async def test_a_link_that_ends_fails_its_calls_after_what_had_come_and_takes_no_more() -> None:
    scene = Scene()
    call, idle = scene.call("ses-1"), scene.call("ses-2")
    scene.sessions["ses-1"].say(0)
    waiting = asyncio.ensure_future(idle.next())
    await asyncio.sleep(0)
    scene.gateway.lose("it closed the connection")
    scene.agent.close()

    assert (await call.next()).position == 0
    with pytest.raises(PeerError) as lost:
        await call.next()
    with pytest.raises(PeerError, match="it closed the connection"):
        await waiting
    assert lost.value.details == {UNREACHABLE: "node agent n-1"}
    assert scene.gateway.call(GenerateRequest(session_id="ses-3"), timeout_seconds=LONG_SECONDS) is None
    assert all(session.left for session in scene.sessions.values())
    call.cancel()
    idle.cancel()


async def test_an_order_that_is_too_long_goes_another_way() -> None:
    scene = Scene()
    order = GenerateRequest(session_id="ses-1", fingerprint=bytes(MAX_MESSAGE_BYTES))

    assert scene.gateway.call(order, timeout_seconds=LONG_SECONDS) is None
    assert not scene.sessions


@pytest.mark.parametrize("frame", [b"\xff\xff", LinkOrder(call=1).SerializeToString()], ids=["torn", "empty"])
async def test_an_order_that_makes_no_sense_ends_the_link(frame: bytes) -> None:
    with pytest.raises(PeerError, match="gateway"):
        Scene().agent.take(frame)


async def test_a_call_is_named_once() -> None:
    scene = Scene()
    order = LinkOrder(call=5, generate=GenerateRequest(session_id="ses-1")).SerializeToString()
    scene.agent.take(order)

    with pytest.raises(PeerError, match="5"):
        scene.agent.take(order)


async def test_news_that_makes_no_sense_or_is_too_much_ends_the_link() -> None:
    scene = Scene()
    call = scene.call("ses-1")
    event = LinkNews(call=1, event=GenerateEvent()).SerializeToString()

    for _ in range(WINDOW_EVENTS):
        scene.gateway.take(event)
    with pytest.raises(PeerError, match="ahead"):
        scene.gateway.take(event)
    for frame in (b"\xff\xff", LinkNews(call=1).SerializeToString(), _error_frame(b"[]")):
        with pytest.raises(PeerError, match="n-1"):
            scene.gateway.take(frame)
    call.cancel()


def _error_frame(error: bytes) -> bytes:
    return LinkNews(call=1, error=error).SerializeToString()
