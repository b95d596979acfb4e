"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from services.gateway.rest.answers import StreamAnswer, WholeAnswer
from services.gateway.rest.edge import REQUEST_ID_KEY
from services.gateway.rest.schema import ChatCompletionRequest, CompletionRequest, parse
from services.gateway.rest.shapes import ChatShape, CompletionShape
from services.gateway.runner import Runner
from stoker.clock import Clock
from stoker.ids import new_id


def inference_router(runner: Runner, clock: Clock, keepalive_seconds: float) -> APIRouter:
    """Return the routes.

    Args:
        runner: Runs the requests.
        clock: For silences and creation times.
        keepalive_seconds: A stream silent for longer gets a comment.
    """
    router = APIRouter(tags=["inference"])

    def answer(
        asked: ChatCompletionRequest | CompletionRequest,
        shape_class: type[ChatShape | CompletionShape],
        id_prefix: str,
        http: Request,
    ) -> Response:
        request = asked.to_text_request(http.scope[REQUEST_ID_KEY])
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
            return StreamAnswer(work, shape, trace, clock=clock, keepalive_seconds=keepalive_seconds)
        return WholeAnswer(work, shape, trace)

    @router.post("/v1/chat/completions", openapi_extra=_body("ChatCompletionRequest"))
    async def create_chat_completion(http: Request) -> Response:
        """Answer a conversation, whole or as a stream of events."""
        return answer(parse(ChatCompletionRequest, await http.body()), ChatShape, "chatcmpl", http)

    @router.post("/v1/completions", openapi_extra=_body("CompletionRequest"))
    async def create_completion(http: Request) -> Response:
        """Continue a text, whole or as a stream of events."""
        return answer(parse(CompletionRequest, await http.body()), CompletionShape, "cmpl", http)

    return router


def _body(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}
