"""The load: clients that ask without end, and what became of every request."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from tests.chaos.asks import Answer, Ask
from tests.chaos.cluster import Gateway

REFUSED = (429, 503)
"""Before a stream's first byte: the client tries again, elsewhere, after a pause."""
MAX_TRIES = 200
RETRY_SECONDS = 0.3
SILENCE_SECONDS = 60.0
"""A stream that says nothing at all for so long is lost: a keep-alive comment is due every second."""


class Lost(Exception):
    """A stream that had begun ended without its end."""


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    streams: int = 0
    tokens: int = 0
    refusals: int = 0
    """Tries that were refused, or not connected, before the first byte."""
    lost: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return it for people."""
        return (
            f"{self.streams} streams, {self.tokens} tokens; lost {len(self.lost)}, "
            f"changed {len(self.changed)}; {self.refusals} refused before they began, then served"
        )


class Clients:
    """Clients of both gateways.

    Args:
        gateways: Where they ask; the first that answers serves a request.
        tally: Told what became of each request.
    """

    def __init__(self, gateways: Sequence[Gateway], tally: Tally) -> None:
        self._gateways = gateways
        self._tally = tally
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(SILENCE_SECONDS, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def answer(self, ask: Ask) -> Answer:
        """Return the answer to a request, tried again while it is refused before it began.

        Raises:
            Lost: It was cut off, or nobody would take it.
        """
        order = random.sample(self._gateways, len(self._gateways))
        why = ""
        for number in range(MAX_TRIES):
            gateway = order[number % len(order)]
            answer = Answer()
            try:
                if await self._try(gateway, ask, answer):
                    return answer
                why = "refused"
            except httpx.HTTPError as error:
                why = f"{gateway.name}: {type(error).__name__}: {error}"
                if answer.chunks:
                    raise Lost(f"{ask.name} after {answer.chunks} chunks at {why}") from error
            self._tally.refusals += 1
            await asyncio.sleep(RETRY_SECONDS)
        raise Lost(f"{ask.name} was refused {MAX_TRIES} times, the last time: {why}")

    async def _try(self, gateway: Gateway, ask: Ask, answer: Answer) -> bool:
        """Read one try into `answer`; False = it was refused."""
        async with self._http.stream("POST", gateway.rest_url + ask.path, json=dict(ask.body)) as response:
            if response.status_code in REFUSED:
                return False
            if response.status_code != httpx.codes.OK:
                raise Lost(f"{ask.name}: {response.status_code} {await response.aread()!r}")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return True
                if line.startswith("data: "):
                    chunk = json.loads(line[len("data: ") :])
                    if "error" in chunk:
                        if not answer.chunks and chunk["error"].get("code") != "stream_lost":
                            return False
                        raise Lost(f"{ask.name} after {answer.chunks} chunks: {chunk['error']}")
                    answer.add(chunk)
        raise Lost(f"{ask.name} ended after {answer.chunks} chunks without [DONE]")


async def keep_asking(
    clients: Clients, wanted: Mapping[Ask, Answer], tally: Tally, *, seed: int, stop: asyncio.Event
) -> None:
    """Ask one request after the other, and compare each answer with its fault-free one, until `stop`."""
    draw = random.Random(seed)
    asks = sorted(wanted, key=lambda ask: ask.name)
    while not stop.is_set():
        ask = draw.choice(asks)
        try:
            answer = await clients.answer(ask)
        except Lost as lost:
            tally.lost.append(str(lost))
            continue
        tally.streams += 1
        tally.tokens += answer.tokens
        if difference := wanted[ask].difference(answer):
            tally.changed.append(f"{ask.name}: {difference}")
