"""Node agents: one channel per address, and a session's stream of tokens from one of them. A shell.

Setting a call up costs more than all else between the two processes (decision 0020), so each agent has one
call open ahead (`Attend`), made while nobody waits; a session that finds none makes its own (`Generate`).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any

import grpc

from services.gateway.routing.routes import Replica
from stoker import rpc
from stoker.errors import DeadlineExceeded, StokerError, WorkerDied
from stoker.v1 import node_agent_pb2, node_agent_pb2_grpc, session_kv_pb2, session_pb2

RELEASE_SECONDS = 5.0
"""Longest call that ends a session which would go on without its reader."""

Call = grpc.aio.UnaryStreamCall[Any, Any] | grpc.aio.StreamStreamCall[Any, Any]


class Agents:
    """Channels to node agents; as many as there are hosts."""

    def __init__(self) -> None:
        self._agents: dict[str, _Agent] = {}

    async def generate(
        self, replica: Replica, order: session_pb2.GenerateRequest, *, timeout_seconds: float
    ) -> AsyncGenerator[session_pb2.GenerateEvent]:
        """Yield a session's events; closing the generator cancels the session.

        Raises:
            StokerError: What the agent or its worker says; WorkerDied when the stream ends too early.
        """
        peer = f"node agent {replica.node_id or replica.agent_address}"
        agent = self._agent(replica.agent_address)
        attending = agent.take_attending()
        call: Call = attending or agent.stub.Generate(order, timeout=timeout_seconds)
        deadline = _Deadline(call, timeout_seconds) if attending is not None else None
        answered = False
        try:
            with rpc.translated(peer):
                if attending is not None:
                    await attending.write(order)
                async for event in call:
                    answered = True
                    yield event
                    if event.finish_reason:
                        return
        except asyncio.CancelledError:
            if deadline is not None and deadline.has_passed:
                raise DeadlineExceeded(f"{peer} did not answer in time") from None
            raise
        finally:
            call.cancel()  # does nothing to a call that has ended
            if order.keep_seconds and left_by_us():
                agent.release(order.session_id, order.epoch)
            if deadline is not None:
                deadline.forget()
            if answered:
                agent.attend()
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
        with rpc.translated(f"node agent {destination.node_id or destination.agent_address}"):
            return await self._agent(destination.agent_address).stub.FetchKv(order, timeout=timeout_seconds)

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
        with rpc.translated(f"node agent {replica.node_id or replica.agent_address}"):
            stub = self._agent(replica.agent_address).stub
            return (await stub.HoldSession(request, timeout=timeout_seconds)).tokens

    async def find_sessions(
        self, address: str, session_ids: Sequence[str], *, timeout_seconds: float
    ) -> Sequence[node_agent_pb2.KeptSession]:
        """Return what the agent at an address has kept of these sessions.

        Raises:
            StokerError: It can't be reached, or not in time.
        """
        with rpc.translated(f"node agent {address}"):
            request = node_agent_pb2.FindSessionsRequest(session_ids=session_ids)
            answer = await self._agent(address).stub.FindSessions(request, timeout=timeout_seconds)
        return answer.sessions

    def release(self, replica: Replica, session_id: str, epoch: int) -> None:
        """Have a session ended that would go on without its reader: nobody wants more of it there."""
        self._agent(replica.agent_address).release(session_id, epoch)

    async def close(self) -> None:
        """Close all channels."""
        agents, self._agents = self._agents, {}
        for agent in agents.values():
            await agent.close()

    def _agent(self, address: str) -> _Agent:
        if address not in self._agents:
            self._agents[address] = _Agent(address)
        return self._agents[address]


class _Agent:
    """One agent's channel, with the call that is open ahead."""

    def __init__(self, address: str) -> None:
        self._channel = rpc.connect(address)
        self.stub = node_agent_pb2_grpc.NodeAgentStub(self._channel)
        self._attending: grpc.aio.StreamStreamCall[Any, Any] | None = None
        self._closed = False
        self._releases: set[asyncio.Task[None]] = set()

    def attend(self) -> None:
        """Open a call ahead, unless there is one."""
        if not self._closed and (self._attending is None or self._attending.done()):
            self._attending = self.stub.Attend()

    def take_attending(self) -> grpc.aio.StreamStreamCall[Any, Any] | None:
        """Return the call that is open ahead, its reader's alone from now on; None when there is none."""
        call, self._attending = self._attending, None
        return None if call is None or call.done() else call

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
        if self._attending is not None:
            self._attending.cancel()
        await self._channel.close()


def left_by_us() -> bool:
    """Say whether a generator's `finally` runs because its reader closed it, not for an error or its own end.

    A client that left cancels the task, and may come back; a reader that closes the stream wants no more.
    """
    task = asyncio.current_task()
    is_closed = sys.exc_info()[0] is GeneratorExit
    return is_closed and (task is None or not task.cancelling())


class _Deadline:
    """Ends a call that was made without a deadline, since nobody knew whose it would be."""

    def __init__(self, call: Call, seconds: float) -> None:
        self.has_passed = False
        self._call = call
        self._timer = asyncio.get_running_loop().call_later(seconds, self._pass)

    def forget(self) -> None:
        """Let the call live."""
        self._timer.cancel()

    def _pass(self) -> None:
        self.has_passed = True
        self._call.cancel()
