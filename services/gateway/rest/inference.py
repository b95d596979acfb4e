"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from services.gateway.rest.answers import StreamAnswer, WholeAnswer
from services.gateway.rest.edge import REQUEST_ID_KEY
from services.gateway.rest.schema import ChatCompletionRequest, CompletionRequest, parse
from services.gateway.rest.shapes import ChatShape, CompletionShape
from services.gateway.rest.short_way import Handler
from services.gateway.runner import Runner
from services.gateway.sessions.request_key import KEY_HEADER, LAST_EVENT_HEADER, RequestKey, read_key
from stoker.clock import Clock
from stoker.errors import InvalidRequest
from stoker.ids import new_id

CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"

DEADLINE_HEADER = "x-stoker-deadline-seconds"
"""Seconds within which the answer must begin, from the request's arrival."""
MAX_DEADLINE_CHARACTERS = 32


def read_deadline(text: str | None) -> float | None:
    """Return the deadline a header states, in seconds; None = there is none.

    Raises:
        InvalidRequest: It is not a positive number.
    """
    if text is None:
        return None
    try:
        seconds = float(text[:MAX_DEADLINE_CHARACTERS])
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidRequest(
            f"{DEADLINE_HEADER}: {text[:MAX_DEADLINE_CHARACTERS]!r} is not a positive number of seconds",
            param=DEADLINE_HEADER,
        )
    return seconds


def inference_handlers(runner: Runner, clock: Clock, keepalive_seconds: float) -> dict[str, Handler]:
    """Return what answers, by path.

    Args:
        runner: Runs the requests.
        clock: For silences and creation times.
        keepalive_seconds: A stream silent for longer gets a comment.
    """

    def answer(
        asked: ChatCompletionRequest | CompletionRequest,
        shape_class: type[ChatShape | CompletionShape],
        id_prefix: str,
        http: Request,
        body: bytes,
    ) -> Response:
        request = asked.to_text_request(
            http.scope[REQUEST_ID_KEY],
            deadline_seconds=read_deadline(http.headers.get(DEADLINE_HEADER)),
            key=_key(http, body, whole=not asked.stream),
        )
        trace = runner.start_trace(request)
        shape = shape_class(
            answer_id=new_id(id_prefix),
            created_unix_seconds=int(clock.unix_seconds()),
            model=asked.model,
            include_usage=asked.include_usage,
            logprobs=request.sampling.top_logprobs is not None,
        )
        work = partial(runner.run, request, trace)
        if asked.stream:
            return StreamAnswer(
                work, shape, trace, clock=clock, keepalive_seconds=keepalive_seconds, key=request.key
            )
        return WholeAnswer(work, shape, trace)

    async def create_chat_completion(http: Request) -> Response:
        """Answer a conversation, whole or as a stream of events."""
        body = await http.body()
        return answer(parse(ChatCompletionRequest, body), ChatShape, "chatcmpl", http, body)

    async def create_completion(http: Request) -> Response:
        """Continue a text, whole or as a stream of events."""
        body = await http.body()
        return answer(parse(CompletionRequest, body), CompletionShape, "cmpl", http, body)

    return {CHAT_PATH: create_chat_completion, COMPLETION_PATH: create_completion}


def inference_router(handlers: Mapping[str, Handler]) -> APIRouter:
    """Return the routes of `inference_handlers`, described for the OpenAPI document."""
    router = APIRouter(tags=["inference"])
    for path, schema in ((CHAT_PATH, "ChatCompletionRequest"), (COMPLETION_PATH, "CompletionRequest")):
        router.post(path, openapi_extra=_body(schema))(handlers[path])
    return router


def _key(http: Request, body: bytes, *, whole: bool) -> RequestKey | None:
    key = read_key(
        http.headers.get(KEY_HEADER),
        http.headers.get(LAST_EVENT_HEADER),
        owner=http.headers.get("authorization", ""),
        path=http.scope["path"],
        body=body,
    )
    if whole and key is not None and key.seen:
        raise InvalidRequest(
            "Last-Event-ID goes with streams: ask with `stream`, or without the header for all of the answer",
            param=LAST_EVENT_HEADER,
        )
    return key


def _body(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}
