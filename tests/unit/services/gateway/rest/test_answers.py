"""Answers send their headers at the right moment, keep silent streams alive, and end once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from services.gateway.rest.answers import StreamAnswer, WholeAnswer, comment
from services.gateway.rest.shapes import ChatShape
from services.gateway.sessions.session import Delta
from services.gateway.text_request import Sink, Waiting
from services.gateway.trace import Trace
from stoker.clock import ManualClock
from stoker.errors import LoadFailed, QueueFull

Work = Callable[[Sink], Awaitable[None]]


class Connection:
    """A client: what it was sent, and when it leaves."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self.got = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        """Say nothing until the client leaves."""
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        """Keep a message."""
        self.sent.append(message)
        self.got.set()
        self.got.clear()

    @property
    def status(self) -> int:
        """Return the answer's status."""
        return self.sent[0]["status"]

    @property
    def body(self) -> str:
        """Return the answer's body so far."""
        return b"".join(message.get("body", b"") for message in self.sent).decode()


def trace() -> Trace:
    return Trace(request_id="q", model="m", kind="chat", started_seconds=0, unix_seconds=0, choices=1)


def shape() -> ChatShape:
    return ChatShape(answer_id="a", created_unix_seconds=1, model="m", include_usage=False, logprobs=False)


def stream(work: Work, clock: ManualClock | None = None) -> StreamAnswer:
    return StreamAnswer(work, shape(), trace(), clock=clock or ManualClock(), keepalive_seconds=1)


async def says_hi(sink: Sink) -> None:
    await sink.delta(0, Delta(text="hi"))
    await sink.delta(0, Delta(finish_reason="stop"))


@pytest.mark.parametrize("make", [stream, lambda work: WholeAnswer(work, shape(), trace())])
async def test_a_refusal_before_the_first_word_has_its_status(make: Callable[[Work], Any]) -> None:
    async def refuse(_: Sink) -> None:
        raise QueueFull("full")

    client = Connection()
    await make(refuse)({}, client.receive, client.send)

    assert client.status == 429
    assert json.loads(client.body)["error"]["code"] == "queue_full"


async def test_an_error_after_the_headers_is_the_last_event() -> None:
    async def fail(sink: Sink) -> None:
        await sink.waiting(Waiting(state="acquiring"))
        raise LoadFailed("torn shards")

    client = Connection()
    await stream(fail)({}, client.receive, client.send)

    comment_line, error, rest = client.body.split("\n\n")
    assert client.status == 200
    assert comment_line == ": stoker model=m state=acquiring"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "load_failed"
    assert rest == ""
    assert "more_body" not in client.sent[-1]


async def test_a_good_stream_ends_with_done() -> None:
    client = Connection()
    await stream(says_hi)({}, client.receive, client.send)

    assert client.body.endswith("data: [DONE]\n\n")
    assert client.body.count('"role":"assistant"') == 1


async def test_a_crash_of_ours_is_told_without_its_insides() -> None:
    async def crash(_: Sink) -> None:
        raise KeyError("secret")

    client = Connection()
    await WholeAnswer(crash, shape(), trace())({}, client.receive, client.send)

    assert client.status == 500
    assert "secret" not in client.body


async def test_a_client_that_leaves_cancels_the_work() -> None:
    cancelled = asyncio.Event()

    async def work(sink: Sink) -> None:
        await sink.waiting(Waiting(state="acquiring"))
        client.left.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    client = Connection()
    await stream(work)({}, client.receive, client.send)

    assert cancelled.is_set()


async def test_a_silent_stream_gets_a_comment_each_period() -> None:
    clock, may_end = ManualClock(), asyncio.Event()

    async def work(_: Sink) -> None:
        await may_end.wait()

    client = Connection()
    answer = asyncio.ensure_future(stream(work, clock)({}, client.receive, client.send))
    for _ in range(3):
        for _ in range(5):
            await asyncio.sleep(0)
        clock.advance(1)
    for _ in range(5):
        await asyncio.sleep(0)
    may_end.set()
    await answer

    assert client.body.count(": stoker model=m state=waiting") == 3


async def test_old_news_grows_older_in_comments() -> None:
    clock, may_end = ManualClock(), asyncio.Event()

    async def work(sink: Sink) -> None:
        await sink.waiting(Waiting(state="starting", replica_id="r", elapsed_seconds=2))
        await may_end.wait()

    client = Connection()
    answer = asyncio.ensure_future(stream(work, clock)({}, client.receive, client.send))
    for _ in range(5):
        await asyncio.sleep(0)
    clock.advance(1.5)
    for _ in range(5):
        await asyncio.sleep(0)
    may_end.set()
    await answer

    assert "elapsed=2.0s" in client.body
    assert "elapsed=3.5s" in client.body


def test_a_comment_is_one_line_whatever_the_reason_says() -> None:
    line = comment("m", Waiting(state="queued", reason="no room\ndata: fake\r\n"))

    assert line == ": stoker model=m state=queued reason=no room data: fake\n\n"


def test_a_comment_tells_how_far_a_start_is() -> None:
    news = Waiting(state="starting", replica_id="r", node_id="n", elapsed_seconds=1.26, loaded_fraction=0.5)

    assert "replica=r node=n elapsed=1.3s predicted=0.0s loaded=50%" in comment("m", news)
