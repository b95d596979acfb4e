"""The load: clients that ask without end, and what became of every request."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from stoker.errors import StreamLost
from tests.chaos import grpc_face
from tests.chaos.asks import Answer, Ask
from tests.chaos.cluster import Gateway

REFUSED = (429, 503)
"""Before a stream's first byte: the client tries again, elsewhere, after a pause."""
MAX_TRIES = 200
RETRY_SECONDS = 0.3
SILENCE_SECONDS = 60.0
"""A stream that says nothing at all for so long is lost: a keep-alive comment is due every second."""
PATIENCE_SECONDS = 8.0
"""After so much silence a client with a key turns to the other gateway: this one may only be paused."""


GRPC_SECONDS = 300.0
"""A whole answer over gRPC, whose stream has no comments that would tell silence from death."""


class Lost(Exception):
    """A stream that had begun ended without its end."""


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    streams: int = 0
    by_grpc: int = 0
    """Of the streams."""
    tokens: int = 0
    reattached: int = 0
    """Times a client lost its gateway in the middle of an answer and got the rest from the other one."""
    ended_with_gateway: int = 0
    """Answers without a key that ended with their gateway, and were asked for again: as documented."""
    refusals: int = 0
    """Tries that were refused, or not connected, before the first byte."""
    lost: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    """Of the refusals."""

    def line(self) -> str:
        """Return it for people."""
        return (
            f"{self.streams} streams ({self.by_grpc} by gRPC), {self.tokens} tokens; lost {len(self.lost)}, "
            f"changed {len(self.changed)}; {self.reattached} re-attached; {self.refusals} refused before "
            "they began, then served"
        )


class Clients:
    """Clients of both gateways.

    Args:
        gateways: Where they ask; the first that answers serves a request.
        tally: Told what became of each request.
        gateways_die: Whether a gateway's death, or its pause, is among the faults.
    """

    def __init__(self, gateways: Sequence[Gateway], tally: Tally, *, gateways_die: bool = False) -> None:
        self._gateways = gateways
        self._tally = tally
        self._gateways_die = gateways_die
        self._http = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def answer(self, ask: Ask, key: str = "") -> Answer:
        """Return the answer to a request, tried again while it is refused before it began.

        Args:
            ask: The request.
            key: Its idempotency key: when its gateway dies the rest comes from another; empty = it has none.

        Raises:
            Lost: It was cut off, or nobody would take it.
        """
        order = random.sample(self._gateways, len(self._gateways))
        why = ""
        answer = Answer()
        for number in range(MAX_TRIES):
            gateway = order[number % len(order)]
            try:
                if await self._try(gateway, ask, answer, key):
                    return answer
                why = f"{gateway.name}: refused"
            except StreamLost as error:
                raise Lost(f"{ask.name} after {answer.chunks} events: {error.message}") from error
            except (httpx.HTTPError, grpc_face.CutOff) as error:
                why = f"{gateway.name}: {type(error).__name__}"
                if answer.chunks and not self._gateways_die:
                    raise Lost(f"{ask.name} after {answer.chunks} chunks at {why}") from error
                if answer.chunks and key:
                    self._tally.reattached += 1
                elif answer.chunks:
                    self._tally.ended_with_gateway += 1
                    answer = Answer()
            self._tally.refusals += 1
            self._tally.reasons[why] += 1
            await asyncio.sleep(RETRY_SECONDS)
        raise Lost(f"{ask.name} was refused {MAX_TRIES} times, the last time: {why}")

    async def _try(self, gateway: Gateway, ask: Ask, answer: Answer, key: str) -> bool:
        """Read one try into `answer`; False = it was refused."""
        if ask.by_grpc:
            return await grpc_face.read(gateway.grpc_address, ask, answer, key, timeout_seconds=GRPC_SECONDS)
        return await self._try_rest(gateway, ask, answer, key)

    async def _try_rest(self, gateway: Gateway, ask: Ask, answer: Answer, key: str) -> bool:
        headers = {"idempotency-key": key} if key else {}
        if answer.event_id:
            headers["last-event-id"] = answer.event_id
        url, body, event_id = gateway.rest_url + ask.path, dict(ask.body), answer.event_id
        timeout = httpx.Timeout(PATIENCE_SECONDS if key else SILENCE_SECONDS, connect=5.0)
        stream = self._http.stream("POST", url, json=body, headers=headers, timeout=timeout)
        async with stream as response:
            if response.status_code in REFUSED:
                return False
            if response.status_code != httpx.codes.OK:
                raise Lost(f"{ask.name}: {response.status_code} {await response.aread()!r}")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return True
                if line.startswith("id: "):
                    event_id = line[len("id: ") :]
                if line.startswith("data: "):
                    chunk = json.loads(line[len("data: ") :])
                    if "error" in chunk:
                        if not answer.chunks and chunk["error"].get("code") != "stream_lost":
                            return False
                        raise Lost(f"{ask.name} after {answer.chunks} chunks: {chunk['error']}")
                    answer.add(chunk)
                    answer.event_id = event_id
        raise Lost(f"{ask.name} ended after {answer.chunks} chunks without [DONE]")


async def keep_asking(  # noqa: PLR0913 - what a client is
    clients: Clients,
    wanted: Mapping[Ask, Answer],
    tally: Tally,
    *,
    seed: int,
    rest_seconds: float,
    stop: asyncio.Event,
) -> None:
    """Ask one request after the other, and compare each answer with its fault-free one, until `stop`."""
    draw = random.Random(seed)
    asks = sorted(wanted, key=lambda ask: ask.name)
    while not stop.is_set():
        await asyncio.sleep(rest_seconds)
        ask = draw.choice(asks)
        try:
            answer = await clients.answer(ask, key=f"{seed}-{draw.getrandbits(64)}" if seed % 2 else "")
        except Lost as lost:
            tally.lost.append(str(lost))
            continue
        tally.streams += 1
        tally.by_grpc += ask.by_grpc
        tally.tokens += answer.tokens
        if difference := wanted[ask].difference(answer):
            tally.changed.append(f"{ask.name}: {difference}")
