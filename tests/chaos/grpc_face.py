"""A try at a gateway's gRPC face, read as `load` reads the REST one: the same answer, ids and errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from stoker.client import AsyncClient
from stoker.errors import CapacityError, PeerError, StreamLost
from stoker.v1 import inference_pb2
from tests.chaos.asks import Answer, Ask

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "max_tokens", "stop",
)  # fmt: skip
"""Of a request's body, what both faces know; gRPC gives one choice, to its end."""


class CutOff(Exception):
    """The gateway went away in the middle."""


async def read(address: str, ask: Ask, answer: Answer, key: str, *, timeout_seconds: float) -> bool:
    """Read one try into `answer`; False = it was refused before it began.

    Args:
        address: `host:port` of the gateway's gRPC face.
        ask: The request.
        answer: What came in earlier tries; with a key this one goes on after it.
        key: Its idempotency key; empty = none.
        timeout_seconds: For the whole answer: a gateway that stands still is found by gRPC's keep-alive.

    Raises:
        CutOff: The connection broke after the first event.
        StreamLost: The gateway says so.
    """
    async with AsyncClient(gateway=address, controller="127.0.0.1:1") as client:  # it administers nothing
        try:
            async with aclosing(_events(client, ask, answer.event_id, key, timeout_seconds)) as events:
                async for event in events:
                    answer.add_event(event)
        except StreamLost:
            raise
        except (PeerError, CapacityError) as error:
            if answer.chunks and isinstance(error, PeerError):
                raise CutOff(error.message) from error
            return False
    return True


def _events(
    client: AsyncClient, ask: Ask, last_event_id: str, key: str, timeout_seconds: float
) -> AsyncGenerator[inference_pb2.TextEvent, None]:
    body = ask.body
    options: dict[str, Any] = {name: body[name] for name in SAMPLING if name in body}
    if "logprobs" in body:
        options["top_logprobs"] = 2
    options |= {
        "timeout_seconds": timeout_seconds,
        "idempotency_key": key or None,
        "last_event_id": last_event_id or None,
    }
    if "messages" in body:
        messages = [(turn["role"], turn["content"]) for turn in body["messages"]]
        return client.chat(body["model"], messages, **options)
    return client.complete(body["model"], body["prompt"], **options)
