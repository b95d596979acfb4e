"""Answers as ASGI responses: a stream of server-sent events, or one JSON object.

Both are the runner's `Sink`, and both cancel the request when the client leaves. A stream's headers go out
with its first message: news of a cold start at once, else the first token, so that a request that is refused
before gets a proper status. A silent stream gets comments, which clients ignore and proxies count as life.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.rest.errors import error_body, error_headers
from services.gateway.rest.shapes import DONE, Collected, Shape, usage
from services.gateway.sessions.request_key import RequestKey, Seen, after_delta, event_ids, revision_tag
from services.gateway.sessions.session import Delta
from services.gateway.text_request import Sink, Waiting
from services.gateway.trace import Trace
from stoker import log
from stoker.clock import Clock
from stoker.errors import StokerError

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

Work = Callable[[Sink], Awaitable[None]]
"""Runs the request into a sink."""


class _Answer(Response, ABC):
    """What both kinds share: the work runs while the client is there."""

    def __init__(self, work: Work, shape: Shape, trace: Trace) -> None:
        super().__init__()
        self._work = work
        self._shape = shape
        self._trace = trace
        self._send: Send
        self._started = False
        self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Run the request and send its answer."""
        self._send = send
        async with asyncio.TaskGroup() as group:
            work = group.create_task(self._produce())
            beside = [group.create_task(_until_left(receive, work)), group.create_task(self._keep_alive())]
            work.add_done_callback(lambda _: [task.cancel() for task in beside])

    async def waiting(self, news: Waiting) -> None:
        """See `Sink`."""

    @abstractmethod
    async def delta(self, choice: int, delta: Delta) -> None:
        """See `Sink`."""

    @abstractmethod
    async def _finish(self) -> None:
        """Send what ends a good answer."""

    async def _keep_alive(self) -> None:
        """Tell a waiting client that it is not forgotten."""

    async def _produce(self) -> None:
        try:
            await self._work(self)
            await self._finish()
        except StokerError as error:
            await self._fail(error)
        except Exception as error:  # noqa: BLE001 - the boundary of a request's task
            log.get().error("request.crashed", exc_info=error)
            await self._fail(StokerError("the gateway failed inside; its log says more"))

    async def _fail(self, error: StokerError) -> None:
        await self._start(error.http_status, error_headers(error))
        await self._send_last(error_body(error))

    async def _send_last(self, body: bytes) -> None:
        self._ended = True
        await self._send({"type": "http.response.body", "body": body})

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self._started = True
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    def _usage(self) -> dict[str, int]:
        return usage(self._trace.prompt_tokens, self._trace.completion_tokens)


class WholeAnswer(_Answer):
    """One JSON object, when all is there."""

    def __init__(self, work: Work, shape: Shape, trace: Trace) -> None:
        super().__init__(work, shape, trace)
        self._choices = [Collected() for _ in range(trace.choices)]

    async def delta(self, choice: int, delta: Delta) -> None:
        """See `Sink`."""
        self._choices[choice].add(delta)

    async def _finish(self) -> None:
        body = self._shape.whole(self._choices, self._usage())
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        await self._start(200, headers)
        await self._send_last(body)


class StreamAnswer(_Answer):
    """Server-sent events.

    Args:
        work: Runs the request.
        shape: How its chunks look.
        trace: Its trace.
        clock: For silences.
        keepalive_seconds: A longer silence gets a comment.
        key: Its reader may come back, so that its events have ids; None = it may not.
    """

    def __init__(  # noqa: PLR0913 - the parts it joins
        self,
        work: Work,
        shape: Shape,
        trace: Trace,
        *,
        clock: Clock,
        keepalive_seconds: float,
        key: RequestKey | None = None,
    ) -> None:
        super().__init__(work, shape, trace)
        self._clock = clock
        self._keepalive_seconds = keepalive_seconds
        self._opened = [False] * trace.choices
        self._seen = None if key is None else list(key.seen) or [Seen()] * trace.choices
        self._news = Waiting(state="waiting")
        self._written_seconds = self._news_seconds = clock.now_seconds()

    async def waiting(self, news: Waiting) -> None:
        """See `Sink`."""
        self._news = news
        self._news_seconds = self._clock.now_seconds()
        await self._write(comment(self._trace.model, news))

    async def delta(self, choice: int, delta: Delta) -> None:
        """See `Sink`."""
        text = self._shape.chunk(choice, delta)
        if self._seen is not None:
            text = self._with_ids(self._seen, choice, delta, text)
        if self._opened[choice]:
            if text:
                await self._write(text)
            return
        self._opened[choice] = True
        self._news = Waiting(state="generating")
        if text := self._shape.opening(choice) + text:
            await self._write(text)
            await asyncio.sleep(
                0
            )  # the loop writes to its sockets when its turn ends: before all that follows

    def _with_ids(self, seen: list[Seen], choice: int, delta: Delta, text: str) -> str:
        """Return a delta's messages, each with the id by which its reader may come back."""
        messages = text.split("\n\n")[:-1]
        named = ""
        for number, message in enumerate(messages):
            seen[choice] = after_delta(len(messages), number, delta)
            named += f"id: {event_ids(revision_tag(self._trace.revision), seen)}\n{message}\n\n"
        return named

    async def _finish(self) -> None:
        last = self._shape.usage_chunk(self._usage()).encode() + DONE
        if not self._started:
            await self._start(200, _STREAM_HEADERS)
        await self._send_last(last)

    async def _fail(self, error: StokerError) -> None:
        if not self._started:
            await super()._fail(error)
            return
        await self._send_last(b"data: " + error_body(error) + b"\n\n")

    async def _write(self, text: str) -> None:
        if not self._started:
            await self._start(200, _STREAM_HEADERS)
        self._written_seconds = self._clock.now_seconds()
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def _keep_alive(self) -> None:
        while not self._ended:
            silent_seconds = self._clock.now_seconds() - self._written_seconds
            if silent_seconds >= self._keepalive_seconds:
                await self._write(comment(self._trace.model, self._news_now()))
                silent_seconds = 0.0
            await self._clock.sleep(self._keepalive_seconds - silent_seconds)

    def _news_now(self) -> Waiting:
        """Return the latest news, grown older since it came."""
        age_seconds = self._clock.now_seconds() - self._news_seconds
        return replace(self._news, elapsed_seconds=self._news.elapsed_seconds + age_seconds)


def comment(model: str, news: Waiting) -> str:
    """Return news as an SSE comment, one line."""
    facts: dict[str, Any] = {"model": model, "state": news.state}
    if news.replica_id:
        facts |= {
            "replica": news.replica_id,
            "node": news.node_id,
            "elapsed": f"{news.elapsed_seconds:.1f}s",
            "predicted": f"{news.predicted_seconds:.1f}s",
            "loaded": f"{news.loaded_fraction:.0%}",
        }
    if news.reason:
        facts["reason"] = news.reason
    line = " ".join(f"{name}={' '.join(str(value).split())}" for name, value in facts.items())
    return f": stoker {line}\n\n"


async def _until_left(receive: Receive, work: asyncio.Task[None]) -> None:
    """Cancel the work when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    work.cancel()
