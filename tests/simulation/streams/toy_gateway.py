"""Gateways of one stream with a key, one after the other: all but the last die, or are paused and wake.

What runs is the gateway's own: session, hops, moves, re-attachment. A paused one goes on where it was, beside
its successor; its client is gone, so what it says reaches nobody, and it must not harm who serves by then.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from services.gateway.job import Job
from services.gateway.routing.routes import RouteTable
from services.gateway.sampling import SamplingRequest
from services.gateway.sessions.hops import HopPolicy
from services.gateway.sessions.reattachment import Reattachment
from services.gateway.sessions.request_key import RequestKey, Seen, revision_tag
from services.gateway.sessions.session import Delta
from services.gateway.sessions.session_run import SessionRun
from services.gateway.text_request import Prompts, TextRequest, Waiting
from services.gateway.trace import Trace
from stoker.errors import StokerError
from tests.integration.streams.client import HastyClock
from tests.simulation.streams.toy_cluster import ToyCluster, ToyPlacement, routes
from tests.unit.services.gateway.builders import session

POLICY = HopPolicy(max_attempts=1_000, max_hops=1_000, resume_timeout_seconds=1e9)
ALL_SHIPPED = replace(POLICY, long_session_tokens=0)
"""Its moves ship the last tokens while the source stands still."""
WOKEN_TURNS = 200
"""Of the loop, in which a gateway that has woken finds that its client has gone."""


class ToyClient:
    """What a client has seen of its answer, through whichever gateway."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens = 0
        self.has_end = False


class ToyGateway:
    """One gateway's part of a stream; also the sink of its session.

    Args:
        cluster: Where it runs; its fate decides when this gateway is struck, and how.
        client: Who reads.
        number: Of the stream's gateways, from 0.
        count: Of them; a stream with one has no key.
        seed: Of the session.
        tokens: Of the answer.
    """

    def __init__(  # noqa: PLR0913 - what a stream is
        self, cluster: ToyCluster, client: ToyClient, *, number: int, count: int, seed: int, tokens: int
    ) -> None:
        fate = cluster.fate
        self._cluster, self._client, self._fate = cluster, client, fate
        self._policy = ALL_SHIPPED if seed % 4 == 3 else POLICY
        self._cut_at = fate.randrange(client.tokens, tokens) if number < count - 1 else tokens + 1
        self._is_cut = asyncio.Event()
        self._is_awake = asyncio.Event()
        self._clock, self._table = HastyClock(), RouteTable()
        self._table.apply(routes(list(cluster.nodes)))
        cluster.tables.append(self._table)
        self.trace = Trace(
            request_id=f"r{number}",
            model="tiny",
            kind="chat",
            started_seconds=self._clock.now_seconds(),
            unix_seconds=1_800_000_000.0 + number,
        )
        self.trace.first_token_seconds = 0.0  # the client has seen something: nothing but success will do
        self._key = self._key_of() if count > 1 else None
        self.session = session(max_tokens=tokens, seed=seed, keep_seconds=60.0 if self._key else 0.0)
        self.placement = ToyPlacement(self._table, self._clock, cluster)
        self.found_tokens = 0
        self.error = ""
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self) -> None:
        """Serve the client until it has all, or this gateway is struck."""
        running = asyncio.create_task(self._run())
        cut = asyncio.create_task(self._is_cut.wait())
        await asyncio.wait({running, cut}, return_when=asyncio.FIRST_COMPLETED)
        if not self._is_cut.is_set():
            cut.cancel()
            return
        self._tasks.append(running)
        if self._fate.random() < 0.5:
            self._cluster.history.append("a gateway dies")
            running.cancel()
        else:
            self._cluster.history.append("a gateway is paused")
            self._tasks.append(asyncio.create_task(self._wake(self._fate.randrange(120))))

    async def end(self) -> None:
        """Let a gateway that was paused find that its client has gone."""
        for task in reversed(self._tasks):
            for _ in range(WOKEN_TURNS):
                if task.done():
                    break
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})

    async def waiting(self, news: Waiting) -> None:
        """See `Sink`."""
        del news
        if self._is_cut.is_set():
            await self._is_awake.wait()

    async def delta(self, choice: int, delta: Delta) -> None:
        """See `Sink`."""
        del choice
        client = self._client
        if not self._is_cut.is_set():
            client.text += delta.text
            client.tokens = delta.received
            client.has_end = delta.finish_reason is not None
            if client.has_end or client.tokens <= self._cut_at:
                return
            self._is_cut.set()
        await self._is_awake.wait()  # what it says after that reaches nobody

    def _key_of(self) -> RequestKey:
        seen = (Seen(tokens=self._client.tokens),) if self._client.tokens else ()
        tag = revision_tag(self._table.find("tiny").revision)
        return RequestKey(name="key", fingerprint=b"f", seed=1, revision_tag=tag, seen=seen)

    async def _run(self) -> None:
        request = TextRequest(
            request_id="r",
            model="tiny",
            content=Prompts(prompts=["x"]),
            sampling=SamplingRequest(),
            key=self._key,
        )
        job = Job(request=request, trace=self.trace, sink=self, clock=self._clock, timeout_seconds=1e12)
        route = self._table.find("tiny")
        place = route.replicas[0]
        try:
            if self._key is not None:
                agents = Reattachment(self._cluster)  # type: ignore[arg-type]
                (place,) = await agents.restore(job, self._key, [self.session], route, place)
                self.found_tokens = len(self.session.token_ids)
            run = SessionRun(self.session, 0, job, self.placement, self._cluster, self._policy)  # type: ignore[arg-type]
            await run.run(place)
        except StokerError as error:
            if not self._is_cut.is_set():
                self.error = f"{type(error).__name__}: {error.message}"

    async def _wake(self, turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        self._is_awake.set()
