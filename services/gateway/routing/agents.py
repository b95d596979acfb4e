"""Node agents: one channel per address, and a session's stream of tokens from one of them. A shell.

Sessions go over a plain connection beside gRPC (`agent_link`), which is made when the first one has been
answered, and made again when it was lost. Where there is none a session makes a call of its own (`Generate`).
"""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import grpc

from services.gateway.routing.agent_link import AgentLink, LinkedCall, stay_linked
from services.gateway.routing.routes import Replica
from stoker import log, rpc
from stoker.errors import StokerError, WorkerDied
from stoker.v1 import node_agent_pb2, node_agent_pb2_grpc, session_kv_pb2, session_pb2

if TYPE_CHECKING:
    from stoker.v1.node_agent_pb2_grpc import NodeAgentAsyncStub

RELEASE_SECONDS = 5.0
"""Longest call that ends a session which would go on without its reader."""
RELINK_SECONDS = 10.0
"""After a try to link an agent's sessions failed, or the link was lost, before the next one."""
MAX_AGENTS = 1024
"""Channels that are kept; beyond, those that were used longest ago are closed: nodes come and go."""


class Agents:
    """Channels to node agents: those that were used last, and those in use."""

    def __init__(self) -> None:
        self._agents: OrderedDict[str, _Agent] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    async def generate(
        self, replica: Replica, order: session_pb2.GenerateRequest, *, timeout_seconds: float
    ) -> AsyncGenerator[session_pb2.GenerateEvent]:
        """Yield a session's events; closing the generator cancels the session.

        Raises:
            StokerError: What the agent or its worker says; WorkerDied when the stream ends too early.
        """
        peer = f"node agent {replica.node_id or replica.agent_address}"
        agent = self._agent(replica.agent_address)
        call = agent.call(order, peer, timeout_seconds)
        answered = False
        agent.users += 1
        try:
            while (event := await call.next()) is not None:
                answered = True
                yield event
                if event.finish_reason:
                    return
        finally:
            agent.users -= 1
            call.cancel()  # does nothing to a call that has ended
            if order.keep_seconds and left_by_us():
                agent.release(order.session_id, order.epoch)
            if answered:
                agent.link_sessions(peer)
        raise WorkerDied(
            f"replica {replica.replica_id} stopped in the middle of an answer; send the request again",
            retry_after_seconds=1.0,
        )

    async def fetch_kv(
        self, destination: Replica, order: node_agent_pb2.FetchKvRequest, *, timeout_seconds: float
    ) -> node_agent_pb2.FetchKvResponse:
        """Have a session's keys and values brought to a replica, straight from where it runs.

        Raises:
            StokerError: Why they are not there; nothing changed where the session runs.
        """
        with self._used(destination.agent_address, destination.node_id) as stub:
            return await stub.FetchKv(order, timeout=timeout_seconds)

    async def hold(
        self, replica: Replica, session_id: str, epoch: int, *, seconds: float, timeout_seconds: float
    ) -> int:
        """Have a session stand still where it runs, for so long at most (0 = go on); return its tokens.

        Raises:
            StokerError: It goes on as before.
        """
        request = session_kv_pb2.HoldSessionRequest(
            session_id=session_id, replica_id=replica.replica_id, epoch=epoch, seconds=seconds
        )
        with self._used(replica.agent_address, replica.node_id) as stub:
            return (await stub.HoldSession(request, timeout=timeout_seconds)).tokens

    async def find_sessions(
        self, address: str, session_ids: Sequence[str], *, timeout_seconds: float
    ) -> Sequence[node_agent_pb2.KeptSession]:
        """Return what the agent at an address has kept of these sessions.

        Raises:
            StokerError: It can't be reached, or not in time.
        """
        request = node_agent_pb2.FindSessionsRequest(session_ids=session_ids)
        with self._used(address) as stub:
            return (await stub.FindSessions(request, timeout=timeout_seconds)).sessions

    def release(self, replica: Replica, session_id: str, epoch: int) -> None:
        """Have a session ended that would go on without its reader: nobody wants more of it there."""
        self._agent(replica.agent_address).release(session_id, epoch)

    async def close(self) -> None:
        """Close all channels."""
        agents, self._agents = self._agents, OrderedDict()
        for agent in agents.values():
            await agent.close()
        await asyncio.gather(*self._closing)

    @contextmanager
    def _used(self, address: str, node_id: str = "") -> Iterator[NodeAgentAsyncStub]:
        """Yield the stub of an agent, whose errors are StokerErrors within the block."""
        agent = self._agent(address)
        agent.users += 1
        try:
            with rpc.translated(f"node agent {node_id or address}"):
                yield agent.stub
        finally:
            agent.users -= 1

    def _agent(self, address: str) -> _Agent:
        agent = self._agents.get(address)
        if agent is None:
            self._close_unused()
            agent = self._agents[address] = _Agent(address)
        self._agents.move_to_end(address)
        return agent

    def _close_unused(self) -> None:
        """Make room for one more, unless all are in use."""
        if len(self._agents) < MAX_AGENTS:
            return
        unused = next((address for address, agent in self._agents.items() if not agent.users), None)
        if unused is not None:
            task = asyncio.create_task(self._agents.pop(unused).close(), name=f"close {unused}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


class _Call:
    """A session's call of its own."""

    def __init__(self, call: grpc.aio.UnaryStreamCall[Any, Any], peer: str) -> None:
        self._call = call
        self._peer = peer

    async def next(self) -> session_pb2.GenerateEvent | None:
        """Return the next event; None = the call has ended. Raises StokerErrors."""
        with rpc.translated(self._peer):
            event = await self._call.read()
        return event if isinstance(event, session_pb2.GenerateEvent) else None

    def cancel(self) -> None:
        """End it, unless it has ended."""
        self._call.cancel()


class _Agent:
    """One agent's channel, with the link for its sessions."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.users = 0
        """Calls under way, but for those that nobody waits for."""
        self._channel = rpc.connect(address)
        self.stub = node_agent_pb2_grpc.NodeAgentStub(self._channel)
        self._link: AgentLink | None = None
        self._linking: asyncio.Task[None] | None = None
        self._next_link_seconds = 0.0
        self._said = ""
        self._closed = False
        self._releases: set[asyncio.Task[None]] = set()

    def call(
        self, order: session_pb2.GenerateRequest, peer: str, timeout_seconds: float
    ) -> _Call | LinkedCall:
        """Have a session run, over the link if there is one."""
        linked = None if self._link is None else self._link.call(order, timeout_seconds=timeout_seconds)
        return linked or _Call(self.stub.Generate(order, timeout=timeout_seconds), peer)

    def link_sessions(self, peer: str) -> None:
        """Link the agent's sessions in the background, unless they are, or that failed a moment ago."""
        now_seconds = asyncio.get_running_loop().time()
        if not self._closed and self._linking is None and now_seconds >= self._next_link_seconds:
            self._linking = asyncio.create_task(self._stay_linked(peer), name=f"link {peer}")  # till `close`

    async def _stay_linked(self, peer: str) -> None:
        try:
            await stay_linked(self.stub, self._address, peer, self._use)
        except StokerError as error:
            if error.message != self._said:  # once, not at every try
                log.get().info("agent.unlinked", address=self._address, reason=error.message)
                self._said = error.message
        finally:
            self._link = self._linking = None
            self._next_link_seconds = asyncio.get_running_loop().time() + RELINK_SECONDS

    def _use(self, link: AgentLink) -> None:
        self._link = link
        self._said = ""

    def release(self, session_id: str, epoch: int) -> None:
        """Have a session ended that would go on without its reader: nobody wants more of it here."""
        if not self._closed:
            task = asyncio.create_task(self._release(session_id, epoch), name=f"release {session_id}")
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def _release(self, session_id: str, epoch: int) -> None:
        request = node_agent_pb2.ReleaseSessionRequest(session_id=session_id, epoch=epoch)
        with suppress(StokerError), rpc.translated("node agent"):  # else it ends by itself, a little later
            await self.stub.ReleaseSession(request, timeout=RELEASE_SECONDS)

    async def close(self) -> None:
        """Close the channel, whatever runs on it."""
        self._closed = True
        for task in self._releases:
            task.cancel()
        if self._linking is not None:
            self._linking.cancel()
            await asyncio.wait([self._linking])
        await self._channel.close()


def left_by_us() -> bool:
    """Say whether a generator's `finally` runs because its reader closed it, not for an error or its own end.

    A client that left cancels the task, and may come back; a reader that closes the stream wants no more.
    """
    task = asyncio.current_task()
    is_closed = sys.exc_info()[0] is GeneratorExit
    return is_closed and (task is None or not task.cancelling())
