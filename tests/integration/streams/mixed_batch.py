"""Streams that share their batches: each is one of the others' surroundings, and each has faults of its own.

A fault's position is how many tokens of its stream the client has by then. Those of one stream lie one or
five apart; those of the four streams of a sampling are together all from 1 to 64.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from services.gateway.routing.routes import Replica
from services.gateway.text.model_text import ModelText
from services.worker import wire
from services.worker.engine.protocol import Sampling, Submit, TokenOut
from services.worker.engine.transformers_engine import TransformersEngine
from stoker.errors import WorkerDied
from stoker.ids import SessionId
from stoker.v1 import session_pb2
from tests.integration.streams.engines import Answer, NewEngine, answer
from tests.unit.services.worker.kv.test_kv_exchange import shipped

POSITIONS = 64
TOKENS = POSITIONS + 8
APART = 4
"""Streams of a sampling, and tokens between two faults of one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One of the streams, with the positions of its faults, ascending."""

    name: SessionId
    is_greedy: bool
    prompt: tuple[int, ...]
    sampling: Mapping[str, Any]
    positions: tuple[int, ...]

    def submit(self) -> Submit:
        """Return it as an engine takes it."""
        sampling = Sampling(**{"top_logprobs": 3, **self.sampling})
        return Submit(session_id=self.name, prompt_token_ids=self.prompt, sampling=sampling)

    async def answer(self, replicas: DyingReplicas, text: ModelText) -> Answer:
        """Return what its client gets."""
        return await answer(replicas, text, list(self.prompt), session_id=self.name, **self.sampling)


def streams(greedy: Mapping[str, Any], sampled: Mapping[str, Any]) -> list[Stream]:
    """Return four streams of each sampling: prompts of other lengths, seeds of their own."""
    return [
        Stream(
            name=SessionId(f"{'greedy' if is_greedy else 'sampled'}-{number}"),
            is_greedy=is_greedy,
            prompt=tuple((7 * i + 31 * number + is_greedy) % 200 + 20 for i in range(3 + 14 * number)),
            sampling={
                **(greedy if is_greedy else sampled),
                "seed": 11 + number,
                "max_tokens": TOKENS,
                "top_logprobs": (3, 20, 1, 5)[number],
                "ignore_eos": True,
            },
            positions=tuple(
                1 + begin + (begin // APART + number) % APART for begin in range(0, POSITIONS, APART)
            ),
        )
        for is_greedy in (True, False)
        for number in range(APART)
    ]


class DyingReplicas:
    """Replicas with all streams in one batch, one after the other; stands where `Agents` does.

    A replica begins when every stream has come to it. It dies when each client has what it gets before the
    stream's next fault: whatever else the engine has made by then, nobody has seen. The last one lives.

    Args:
        new_engine: Builds a replica's engine.
        kills: By stream, the tokens after which its replicas die, ascending; equally many for each.
    """

    def __init__(self, new_engine: NewEngine, kills: Mapping[SessionId, Sequence[int]]) -> None:
        self._new_engine = new_engine
        self._kills = kills
        self._lives: list[_Life] = []
        self.batch_sizes: list[int] = []
        """Sessions in the batch of each replica that died, when it did."""
        self.resumed: dict[SessionId, list[int]] = {name: [] for name in kills}
        """By stream, the tokens it had wherever it went on: what its client had seen at each kill."""

    async def generate(
        self, _replica: Replica, order: session_pb2.GenerateRequest, *, timeout_seconds: float
    ) -> AsyncGenerator[session_pb2.GenerateEvent]:
        """Yield a stream's events until it ends or the replica dies."""
        del timeout_seconds
        name = SessionId(order.session_id)
        if order.epoch:
            self.resumed[name].append(len(order.generated_token_ids))
        while len(self._lives) <= order.epoch:
            number = len(self._lives)
            ends = {name: (*at, TOKENS)[number] for name, at in self._kills.items()}
            is_last = any(number == len(at) for at in self._kills.values())
            self._lives.append(_Life(self._new_engine(), ends, seed=number, dies=not is_last))
        life = self._lives[order.epoch]
        try:
            async for event in life.serve(name, order):
                yield event
        except WorkerDied:
            self.batch_sizes.append(life.batch_size)
            raise


class _Life:
    """One replica: an engine that is stepped by whoever waits for a token.

    Args:
        engine: Its engine, closed when it dies or the last stream has ended.
        ends: By stream, how many tokens its client has when the replica dies.
        seed: Of the steps between the arrivals.
        dies: Whether it does; else `ends` are the streams' own.
    """

    def __init__(
        self, engine: TransformersEngine, ends: Mapping[SessionId, int], *, seed: int, dies: bool
    ) -> None:
        self._engine, self._ends, self._dies = engine, ends, dies
        self._random = random.Random(seed)
        self._orders: dict[SessionId, session_pb2.GenerateRequest] = {}
        self._events: dict[SessionId, deque[session_pb2.GenerateEvent]] = {name: deque() for name in ends}
        self._ready: set[SessionId] = set()
        self._has_begun, self._is_over = asyncio.Event(), asyncio.Event()
        self.batch_size = 0

    async def serve(
        self, name: SessionId, order: session_pb2.GenerateRequest
    ) -> AsyncGenerator[session_pb2.GenerateEvent]:
        """Yield a stream's events as far as its client gets them."""
        self._orders[name] = order
        if len(self._orders) == len(self._ends):
            self._begin()
            self._has_begun.set()
        await self._has_begun.wait()
        count, events = len(order.generated_token_ids), self._events[name]
        while count < self._ends[name]:
            while not events:
                self._step()
            event = events.popleft()
            count += len(event.tokens)
            yield event
        self._ready.add(name)
        if len(self._ready) == len(self._ends):
            self.batch_size = self._engine.stats().running
            self._step()  # a token ahead: what nobody has seen must not matter
            self._engine.close()
            self._is_over.set()
        await self._is_over.wait()
        if self._dies:
            raise WorkerDied("killed")

    def _begin(self) -> None:
        """Let the streams in, in any order, with steps between them."""
        names = sorted(self._orders)
        self._random.shuffle(names)
        for name in names:
            received = session_pb2.GenerateRequest.FromString(self._orders[name].SerializeToString())
            self._engine.submit(wire.submit(received, name))
            for _ in range(self._random.randrange(2)):
                self._step()

    def _step(self) -> None:
        owners = {
            name: wire.Owner(session_id=name, epoch=order.epoch) for name, order in self._orders.items()
        }
        for item in wire.step_event(self._engine.step(), owners).sessions:
            event = session_pb2.GenerateEvent.FromString(item.event.SerializeToString())
            self._events[SessionId(item.session_id)].append(event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hops:
    """What came of streams that hopped between two engines."""

    made: dict[SessionId, list[TokenOut]]
    positions: dict[SessionId, list[int]]
    """By stream, the tokens it had at each of its hops."""
    mates: list[tuple[int, int]]
    """At each hop, the sessions it left behind and those it came to."""
    computed_tokens: int
    """Prefilled or replayed, in both engines."""


def hopped(new_engine: NewEngine, all_streams: Sequence[Stream]) -> Hops:
    """Run streams in two engines at once; each goes to the other at its positions, with keys and values."""
    engines = (new_engine(), new_engine())
    made: dict[SessionId, list[TokenOut]] = {stream.name: [] for stream in all_streams}
    positions: dict[SessionId, list[int]] = {stream.name: [] for stream in all_streams}
    mates: list[tuple[int, int]] = []
    at = {stream.name: number % 2 for number, stream in enumerate(all_streams)}
    for stream in all_streams:
        engines[at[stream.name]].submit(stream.submit())
    while any(len(outs) < TOKENS for outs in made.values()):
        for out in [out for engine in engines for out in engine.step()]:
            if isinstance(out, TokenOut):
                made[out.session_id].append(out)
        for stream in all_streams:
            name, count = stream.name, len(made[stream.name])
            if count not in stream.positions or count in positions[name]:
                continue
            source, destination = engines[at[name]], engines[1 - at[name]]
            mates.append((source.stats().running - 1, destination.stats().running))
            staged = shipped(source.export_kv(name), destination)
            source.cancel(name)
            generated = [out.token_id for out in made[name]]
            destination.submit(replace(stream.submit(), generated_token_ids=generated, staged=staged))
            positions[name].append(count)
            at[name] = 1 - at[name]
    stats = [engine.stats() for engine in engines]
    for engine in engines:
        engine.close()
    return Hops(
        made=made,
        positions=positions,
        mates=mates,
        computed_tokens=sum(each.prefill_token_count + each.replay_token_count for each in stats),
    )
