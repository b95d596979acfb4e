"""gRPC `stoker.v1.Inference`: the same requests as REST, for typed clients.

What REST takes as the headers `Idempotency-Key` and `Last-Event-ID` comes as metadata of the same names: it
says how a request is sent, not what is asked. So the key's fingerprint is of the whole message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from services.gateway.api_keys import ApiKeys
from services.gateway.routing.route_watch import RouteWatch
from services.gateway.runner import Runner
from services.gateway.sampling import SamplingRequest
from services.gateway.sessions.request_key import (
    KEY_HEADER,
    LAST_EVENT_HEADER,
    RequestKey,
    after_delta,
    event_ids,
    read_key,
    revision_tag,
)
from services.gateway.sessions.session import Alternative, Delta, ScoredToken
from services.gateway.text_request import Conversation, Prompts, TextRequest, Waiting
from services.gateway.trace import Trace
from stoker.errors import InvalidRequest
from stoker.ids import new_id
from stoker.v1 import inference_pb2, inference_pb2_grpc, session_pb2

SERVICE_NAME = "stoker.v1.Inference"
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20

_REASONS = {"stop": session_pb2.FINISH_REASON_STOP, "length": session_pb2.FINISH_REASON_LENGTH}
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("lie in [0, 2]", lambda value: 0 <= value <= 2),  # noqa: PLR2004 - the range, as said
    "top_p": ("lie in (0, 1]", lambda value: 0 < value <= 1),
    "min_p": ("lie in [0, 1]", lambda value: 0 <= value <= 1),
    "repetition_penalty": ("be above 0, at most 100", lambda value: 0 < value <= 100),  # noqa: PLR2004 - as said
    "presence_penalty": ("lie in [-2, 2]", lambda value: -2 <= value <= 2),  # noqa: PLR2004 - as said
    "frequency_penalty": ("lie in [-2, 2]", lambda value: -2 <= value <= 2),  # noqa: PLR2004 - as said
    "max_tokens": ("be at least 1", lambda value: value >= 1),
    "top_logprobs": (f"be at most {MAX_TOP_LOGPROBS}", lambda value: value <= MAX_TOP_LOGPROBS),
}
NO_DEADLINE_SECONDS = 30 * 24 * 3600.0
"""A call without a deadline says that longer than this is left, or nothing at all."""


class Inference(inference_pb2_grpc.InferenceServicer):
    """Serves the service.

    Args:
        runner: Runs the requests.
        watch: Routes, for the list of models.
        api_keys: Keys accepted, as `authorization` metadata.
    """

    def __init__(self, runner: Runner, watch: RouteWatch, api_keys: ApiKeys) -> None:
        self._runner = runner
        self._watch = watch
        self._api_keys = api_keys

    async def Chat(  # type: ignore[override]  # noqa: N802 - the rpc's name; this handler writes to the context
        self,
        request: inference_pb2.ChatRequest,
        context: grpc.aio.ServicerContext[Any, inference_pb2.TextEvent],
    ) -> None:
        """Answer a conversation."""
        self._admit(context)
        if not request.messages:
            raise InvalidRequest("send at least one message", param="messages")
        for message in request.messages:
            if message.role not in _ROLES:
                raise InvalidRequest(
                    f"role {message.role!r} is not one of {', '.join(sorted(_ROLES))}", param="messages"
                )
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        await self._answer("Chat", request, Conversation(messages=messages), context)

    async def Complete(  # type: ignore[override]  # noqa: N802 - the rpc's name; this handler writes to the context
        self,
        request: inference_pb2.CompleteRequest,
        context: grpc.aio.ServicerContext[Any, inference_pb2.TextEvent],
    ) -> None:
        """Continue a text."""
        self._admit(context)
        await self._answer("Complete", request, Prompts(prompts=[request.prompt]), context)

    async def ListDeployedModels(  # noqa: N802 - the rpc's name
        self,
        request: inference_pb2.ListDeployedModelsRequest,  # noqa: ARG002 - gRPC's signature
        context: Any,
    ) -> inference_pb2.ListDeployedModelsResponse:
        """Return the names of the deployed models."""
        self._admit(context)
        names = sorted(name for route in self._watch.table.models() for name in route.names)
        return inference_pb2.ListDeployedModelsResponse(names=names)

    def _admit(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._api_keys.check(_sent(context, "authorization") or "")

    async def _answer(
        self,
        method: str,
        asked: inference_pb2.ChatRequest | inference_pb2.CompleteRequest,
        content: Conversation | Prompts,
        context: grpc.aio.ServicerContext[Any, inference_pb2.TextEvent],
    ) -> None:
        request = TextRequest(
            request_id=new_id("req"),
            model=asked.model,
            content=content,
            sampling=read_sampling(asked.sampling),
            deadline_seconds=_deadline_seconds(context),
            key=_key(method, asked, context),
        )
        trace = self._runner.start_trace(request)
        sink = _ContextSink(trace, context, request.key)
        await self._runner.run(request, trace, sink)
        await sink.finish()


class _ContextSink:
    """Writes an answer to a call; the last delta is kept until the usage is known.

    Args:
        trace: Of the request.
        context: Of the call.
        key: Its reader may come back, so that its events have ids; None = it may not.
    """

    def __init__(
        self,
        trace: Trace,
        context: grpc.aio.ServicerContext[Any, inference_pb2.TextEvent],
        key: RequestKey | None,
    ) -> None:
        self._trace = trace
        self._context = context
        self._has_key = key is not None
        self._last: inference_pb2.TextEvent | None = None
        self._is_first = True

    async def waiting(self, news: Waiting) -> None:
        """See `Sink`: gRPC's own pings keep the call alive."""

    async def delta(self, choice: int, delta: Delta) -> None:  # noqa: ARG002 - one choice per call
        """See `Sink`."""
        event = inference_pb2.TextEvent(
            text=delta.text,
            tokens=[_token(token) for token in delta.tokens],
            request_id=self._trace.request_id,
        )
        if self._is_first and self._trace.start is not None:
            event.start.CopyFrom(self._trace.start)
        self._is_first = False
        if self._has_key:
            event.event_id = event_ids(revision_tag(self._trace.revision), [after_delta(1, 0, delta)])
        if delta.finish_reason is not None:
            event.finish_reason = _REASONS[delta.finish_reason]
            self._last = event
        elif delta.text or delta.tokens:
            await self._context.write(event)

    async def finish(self) -> None:
        """Write the last event, with the usage."""
        if self._last is None:
            return
        self._last.usage.prompt_tokens = self._trace.prompt_tokens
        self._last.usage.completion_tokens = self._trace.completion_tokens
        await self._context.write(self._last)


def read_sampling(asked: inference_pb2.TextSampling) -> SamplingRequest:
    """Return the sampling a gRPC client asked for.

    Raises:
        InvalidRequest: A value is out of range; `param` names the field.
    """
    given = {descriptor.name: value for descriptor, value in asked.ListFields()}
    for name, (rule, holds) in _RANGES.items():
        if name in given and not holds(given[name]):
            raise InvalidRequest(f"{name} is {given[name]:g}; it must {rule}", param=name)
    stops = list(given.pop("stop", ()))
    if len(stops) > MAX_STOPS or not all(stops):
        raise InvalidRequest(f"stop takes at most {MAX_STOPS} strings, none of them empty", param="stop")
    return SamplingRequest(**given, stop=tuple(stops))


def _key(
    method: str,
    asked: inference_pb2.ChatRequest | inference_pb2.CompleteRequest,
    context: grpc.aio.ServicerContext[Any, Any],
) -> RequestKey | None:
    """Return what the call's idempotency key makes of it; None = it has none."""
    return read_key(
        _sent(context, KEY_HEADER),
        _sent(context, LAST_EVENT_HEADER),
        owner=_sent(context, "authorization") or "",
        path=f"/{SERVICE_NAME}/{method}",
        body=asked.SerializeToString(deterministic=True),
    )


def _sent(context: grpc.aio.ServicerContext[Any, Any], name: str) -> str | None:
    """Return the first entry of the call's metadata with this name, None = there is none."""
    for key, value in context.invocation_metadata() or ():
        if key == name and isinstance(value, str):
            return value
    return None


def _token(token: ScoredToken) -> inference_pb2.TextToken:
    message = _alternative(token)
    message.top_logprobs.extend(_alternative(other) for other in token.top)
    return message


def _alternative(token: Alternative) -> inference_pb2.TextToken:
    return inference_pb2.TextToken(text=token.text, raw=token.raw, logprob=token.logprob)


def _deadline_seconds(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """Return the call's deadline, from now; None = it has none."""
    left_seconds: float | None = context.time_remaining()
    if left_seconds is None or left_seconds >= NO_DEADLINE_SECONDS:
        return None
    return max(0.001, left_seconds)
