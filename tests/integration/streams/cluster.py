"""Replicas in one process: real relays, run streams and engine threads; only gRPC is left out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, Self

from services.gateway.routing.routes import Replica
from services.node_agent.sessions.epoch_fence import EpochFence
from services.node_agent.sessions.relay import SessionRelay
from services.worker.engine.engine_thread import EngineThread
from services.worker.engine.transformers_engine import TransformersEngine
from services.worker.kv.kv_desk import KvDesk
from services.worker.run_stream import RunStream
from stoker.errors import ReplicaGone, WorkerDied
from stoker.v1 import session_pb2
from stoker.v1.node_agent_pb2 import FetchKvRequest, FetchKvResponse
from stoker.v1.session_kv_pb2 import KvPart, ReadKvRequest, WriteKvResponse
from stoker.v1.worker_pb2 import RunCommand, StepEvent

Event = session_pb2.GenerateEvent
Happening = Callable[["Cluster", "Node", session_pb2.GenerateRequest, Event], None]
"""Called with each event of a replica before the gateway sees it."""


class _Run:
    """The `Run` call of a worker in this process."""

    def __init__(self, stream: RunStream, engine: EngineThread, commands: AsyncIterator[RunCommand]) -> None:
        self._stream, self._engine = stream, engine
        self._taking = asyncio.create_task(self._take(commands))

    async def _take(self, commands: AsyncIterator[RunCommand]) -> None:
        async for command in commands:
            self._stream.take(command, self._engine)

    async def __aiter__(self) -> AsyncIterator[StepEvent]:
        async for step in self._stream.events():
            yield StepEvent.FromString(step.SerializeToString())

    def cancel(self) -> None:
        """End the call."""
        self._taking.cancel()


class Node:
    """A node with one replica: an agent's relay and fence, a worker's stream and engine."""

    def __init__(self, engine: TransformersEngine) -> None:
        loop = asyncio.get_running_loop()
        self._stream = RunStream(loop)
        self._engine = EngineThread(engine, on_outputs=self._stream.on_outputs, on_failure=self._failed)
        self._engine.start()
        self._desk = KvDesk(self._engine)
        self._stream.expect_kv(self._desk)
        self.is_dead = False
        self.failure: BaseException | None = None
        self.fence = EpochFence()
        self.relay = SessionRelay(
            self,  # type: ignore[arg-type]  # it has the one method that is called
            peer="worker",
            max_sessions=64,
            on_change=lambda: None,
            now_seconds=lambda: 0.0,
        )
        self._relaying = asyncio.create_task(self.relay.run())

    def Run(self, commands: AsyncIterator[RunCommand]) -> Any:  # noqa: N802 - the rpc's name
        """Stand where the worker's stub does."""
        return _Run(self._stream, self._engine, commands)

    @property
    def prefilled_tokens(self) -> int:
        """Return how many tokens it has prefilled."""
        return self._engine.engine.stats().prefill_token_count

    @property
    def replayed_tokens(self) -> int:
        """Return how many tokens it has computed without asking what follows."""
        return self._engine.engine.stats().replay_token_count

    @property
    def kv_tokens(self) -> int:
        """Return how many tokens of its cache are taken."""
        return self._engine.engine.stats().kv_tokens

    def _failed(self, cause: BaseException) -> None:
        """Take note of a step that failed as a whole: `close` raises it."""
        self.failure = cause

    def kill(self) -> None:
        """End it as a crash does: nothing more comes from it."""
        self.is_dead = True
        self._relaying.cancel()
        self.relay.fail_all(WorkerDied("killed"))

    def ask_to_leave(self) -> None:
        """Begin to drain."""
        self.relay.ask_to_leave("test", 30)

    async def read_kv(self, order: FetchKvRequest) -> AsyncGenerator[KvPart]:
        """Give a session's keys and values away."""
        if self.is_dead:
            raise ReplicaGone("it was killed")
        request = ReadKvRequest(
            session_id=order.session_id,
            epoch=order.from_epoch,
            from_token=order.from_token,
            hold_seconds=order.hold_seconds,
        )
        engine_id = self._stream.engine_id(order.session_id, order.from_epoch)
        async with aclosing(self._desk.read(request, engine_id)) as parts:
            async for part in parts:
                if self.is_dead:
                    raise ReplicaGone("it was killed")
                yield KvPart.FromString(part)

    async def hold(self, session_id: str, epoch: int, seconds: float) -> int:
        """Have a session stand still, as the worker's shell does."""
        if self.is_dead:
            raise ReplicaGone("it was killed")
        held = self._engine.hold(self._stream.engine_id(session_id, epoch), seconds)
        return await asyncio.wrap_future(held)

    async def write_kv(self, parts: AsyncIterator[KvPart]) -> WriteKvResponse:
        """Take a coming session's keys and values."""
        if self.is_dead:
            raise ReplicaGone("it was killed")
        return await self._desk.write(parts)

    async def close(self) -> None:
        """Give everything back."""
        self.kill()
        self._desk.close()
        await asyncio.wait([self._relaying])
        assert await asyncio.to_thread(self._engine.close)
        if self.failure is not None:
            raise self.failure


class Cluster:
    """Nodes by the number of their replica; stands where the gateway's `Agents` does.

    Args:
        new_engine: Builds a replica's engine.
        happening: See `Happening`.
        on_part: Called with each part of keys and values on its way; may change it, or raise.
    """

    def __init__(
        self,
        new_engine: Callable[[], TransformersEngine],
        happening: Happening,
        on_part: Callable[[Cluster, KvPart], None] = lambda *_: None,
    ) -> None:
        self._on_part = on_part
        self.shipped: list[FetchKvResponse] = []
        self.holds: list[float] = []
        self._new_engine = new_engine
        self._happening = happening
        self._stack = AsyncExitStack()
        self.nodes: dict[str, Node] = {}
        self.orders: list[session_pb2.GenerateRequest] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def generate(
        self, replica: Replica, order: session_pb2.GenerateRequest, *, timeout_seconds: float
    ) -> AsyncGenerator[Event]:
        """Yield a session's events, as `Agents.generate`."""
        node = self._node(replica.replica_id)
        received = session_pb2.GenerateRequest.FromString(order.SerializeToString())
        self.orders.append(received)
        if node.is_dead:
            raise ReplicaGone("it was killed")
        node.fence.admit(received.session_id, received.epoch, follows=received.follows)
        async with _opened(node.relay, received) as session:
            while True:
                event = Event.FromString((await session.next()).SerializeToString())
                self._happening(self, node, received, event)
                yield event
                if event.finish_reason:
                    return

    async def fetch_kv(
        self, destination: Replica, order: FetchKvRequest, *, timeout_seconds: float
    ) -> FetchKvResponse:
        """Ship keys and values between two nodes, as `Agents.fetch_kv`."""
        source, node = self.nodes[order.from_replica_id], self._node(destination.replica_id)
        parts = source.read_kv(order)
        async with aclosing(parts):
            written = await node.write_kv(self._watched(parts))
        response = FetchKvResponse(
            tokens=written.tokens, data_bytes=written.data_bytes, held_tokens=written.held_tokens
        )
        self.shipped.append(response)
        return response

    async def hold(
        self, replica: Replica, session_id: str, epoch: int, *, seconds: float, timeout_seconds: float
    ) -> int:
        """Have a session stand still, as `Agents.hold`."""
        self.holds.append(seconds)
        return await self._node(replica.replica_id).hold(session_id, epoch, seconds)

    async def _watched(self, parts: AsyncIterator[KvPart]) -> AsyncIterator[KvPart]:
        async for part in parts:
            self._on_part(self, part)
            yield part

    def _node(self, replica_id: str) -> Node:
        node = self.nodes.get(replica_id)
        if node is None:
            node = self.nodes[replica_id] = Node(self._new_engine())
            self._stack.push_async_callback(node.close)
        return node


@asynccontextmanager
async def _opened(relay: SessionRelay, request: session_pb2.GenerateRequest) -> AsyncIterator[Any]:
    session = relay.open(request)
    try:
        yield session
    finally:
        relay.close(session)
