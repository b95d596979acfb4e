"""Calls of `stoker.v1.Inference`: what becomes of their metadata, and the ids of their events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from services.gateway.api_keys import ApiKeys
from services.gateway.grpc_api import Inference
from services.gateway.sessions.request_key import RequestKey, Seen, revision_tag
from services.gateway.sessions.session import Delta
from services.gateway.text_request import Sink, TextRequest
from services.gateway.trace import Trace
from stoker.errors import InvalidRequest
from stoker.v1 import inference_pb2

CHAT = inference_pb2.ChatRequest(
    model="tiny", messages=[inference_pb2.ChatMessage(role="user", content="hi")]
)
COMPLETE = inference_pb2.CompleteRequest(model="tiny", prompt="hi")


class Runner:
    """Answers every request with the same deltas."""

    def __init__(self) -> None:
        self.requests: list[TextRequest] = []

    def start_trace(self, request: TextRequest) -> Trace:
        """See `Runner`."""
        return Trace(request_id="q", model="tiny", kind="chat", started_seconds=0, unix_seconds=0)

    async def run(self, request: TextRequest, trace: Trace, sink: Sink) -> None:
        """Say two words and stop."""
        self.requests.append(request)
        trace.revision = "r1"
        await sink.delta(0, Delta(text="Hello", received=5))
        await sink.delta(0, Delta(received=6))  # half a character
        await sink.delta(0, Delta(text="!", finish_reason="stop", received=8))


class Call:
    """A call's context."""

    def __init__(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        self._metadata = metadata
        self.events: list[inference_pb2.TextEvent] = []

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """Return what the client sent."""
        return self._metadata

    def time_remaining(self) -> None:
        """Have no deadline."""

    async def write(self, event: inference_pb2.TextEvent) -> None:
        """Keep an event."""
        self.events.append(event)


async def answered(
    request: inference_pb2.ChatRequest | inference_pb2.CompleteRequest, **metadata: str
) -> tuple[RequestKey | None, list[inference_pb2.TextEvent]]:
    """Return the key that a call's metadata became, and its events."""
    runner, call = Runner(), Call([(name.replace("_", "-"), value) for name, value in metadata.items()])
    service: Any = Inference(runner, None, ApiKeys(()))  # type: ignore[arg-type]  # it stands where they do
    ask = service.Chat if isinstance(request, inference_pb2.ChatRequest) else service.Complete
    await ask(request, call)
    return runner.requests[0].key, call.events


async def key_of(
    request: inference_pb2.ChatRequest | inference_pb2.CompleteRequest, **metadata: str
) -> RequestKey:
    key, _ = await answered(request, **metadata)
    assert key is not None
    return key


async def test_without_a_key_events_have_no_ids() -> None:
    key, events = await answered(CHAT)

    assert key is None
    assert [(event.text, event.event_id) for event in events] == [("Hello", ""), ("!", "")]


async def test_with_a_key_every_event_has_the_id_by_which_its_reader_may_come_back() -> None:
    _, events = await answered(CHAT, idempotency_key="k")
    tag = revision_tag("r1")

    assert [event.event_id for event in events] == [f"{tag}:5", f"{tag}:8f"]


async def test_the_last_event_says_what_the_client_has() -> None:
    key = await key_of(CHAT, idempotency_key="k", last_event_id="01234567:5")

    assert key.seen == (Seen(tokens=5),)
    assert key.revision_tag == "01234567"


async def test_the_same_message_under_a_key_is_the_same_request_and_any_other_is_not() -> None:
    again = inference_pb2.ChatRequest.FromString(CHAT.SerializeToString())
    other = inference_pb2.ChatRequest(model="tiny", messages=CHAT.messages)
    other.sampling.seed = 1
    first, repeated, changed, completion = [
        await key_of(each, idempotency_key="k") for each in (CHAT, again, other, COMPLETE)
    ]

    assert first == repeated
    assert len({each.fingerprint for each in (first, changed, completion)}) == 3
    assert first.name == changed.name


async def test_a_key_belongs_to_who_sent_it() -> None:
    mine = await key_of(CHAT, idempotency_key="k", authorization="Bearer a")
    theirs = await key_of(CHAT, idempotency_key="k", authorization="Bearer b")

    assert mine.name != theirs.name


@pytest.mark.parametrize(
    ("metadata", "param"),
    [
        ({"idempotency_key": "a b"}, "idempotency-key"),
        ({"last_event_id": "01234567:5"}, "last-event-id"),
        ({"idempotency_key": "k", "last_event_id": "5"}, "last-event-id"),
    ],
)
async def test_metadata_that_makes_no_sense_is_refused(metadata: dict[str, str], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await answered(COMPLETE, **metadata)

    assert caught.value.param == param
