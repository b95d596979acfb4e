"""Node agents: one channel per address, and a session's stream of tokens from one of them. A shell."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import grpc

from services.gateway.routes import Replica
from stoker import rpc
from stoker.errors import WorkerDied
from stoker.v1 import node_agent_pb2_grpc, session_pb2


class Agents:
    """Channels to node agents; as many as there are hosts."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def generate(
        self, replica: Replica, order: session_pb2.GenerateRequest, *, timeout_seconds: float
    ) -> AsyncGenerator[session_pb2.GenerateEvent]:
        """Yield a session's events; closing the generator cancels the session.

        Raises:
            StokerError: What the agent or its worker says; WorkerDied when the stream ends too early.
        """
        stub = node_agent_pb2_grpc.NodeAgentStub(self._channel(replica.agent_address))
        call = stub.Generate(order, timeout=timeout_seconds)
        try:
            with rpc.translated(f"node agent {replica.node_id or replica.agent_address}"):
                async for event in call:
                    yield event
                    if event.finish_reason:
                        return
        finally:
            call.cancel()  # does nothing to a call that has ended
        raise WorkerDied(
            f"replica {replica.replica_id} stopped in the middle of an answer; send the request again",
            retry_after_seconds=1.0,
        )

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            await channel.close()

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = rpc.connect(address)
        return self._channels[address]
