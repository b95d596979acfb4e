"""Calls to node agents and stores: one channel per address, kept while the node is known."""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from services.controller.records import ModelRecord, ReservationRecord
from services.controller.settings import ControllerSettings
from stoker.ids import ReplicaId
from stoker.rpc import connect, translated
from stoker.v1 import checkpoint_store_pb2, checkpoint_store_pb2_grpc, model_pb2
from stoker.v1 import node_agent_pb2 as agent_pb2
from stoker.v1 import node_agent_pb2_grpc as agent_grpc

STOP_MARGIN_SECONDS = 5.0
"""What an agent gets beyond the sessions' grace to answer a stop."""


class Orders:
    """Sends orders that carry the fence of one term."""

    def __init__(self, settings: ControllerSettings, fence: int) -> None:
        self._settings = settings
        self._fence = fence
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def start_replica(
        self, address: str, reservation: ReservationRecord, model: ModelRecord, placement_seconds: float
    ) -> None:
        """Order an agent to start a replica; returns once it has accepted.

        Raises:
            StokerError: As the agent answered; `PeerError` when it cannot be reached.
        """
        request = agent_pb2.StartReplicaRequest(
            replica_id=reservation.replica_id,
            spec=model.spec,
            checkpoint=model.checkpoint,
            devices=reservation.devices,
            fence=self._fence,
            predicted_seconds=reservation.predicted_seconds,
            placement_seconds=placement_seconds,
        )
        with translated(f"node agent {reservation.node_id}"):
            await self._agent(address).StartReplica(request, timeout=self._settings.order_timeout_seconds)

    async def stop_replica(
        self,
        address: str,
        replica_id: ReplicaId,
        *,
        only_if_idle: bool,
        reason: str,
        to_replica_id: str = "",
    ) -> None:
        """Order an agent to stop a replica; its sessions go where it says, if it does.

        Raises:
            StokerError: As the agent answered; `PeerError` when it cannot be reached.
        """
        grace_seconds = 0.0 if only_if_idle else self._settings.drain_grace_seconds
        request = agent_pb2.StopReplicaRequest(
            replica_id=replica_id,
            only_if_idle=only_if_idle,
            grace_seconds=grace_seconds,
            reason=reason,
            fence=self._fence,
            to_replica_id=to_replica_id,
        )
        with translated(f"node agent at {address}"):
            await self._agent(address).StopReplica(
                request, timeout=self._settings.order_timeout_seconds + grace_seconds + STOP_MARGIN_SECONDS
            )

    async def move_sessions(
        self, address: str, request_id: str, to_replica_ids: Mapping[str, str]
    ) -> agent_pb2.MoveSessionsResponse:
        """Have a request's sessions asked to move, if they run on that agent's node.

        Args:
            address: The agent's.
            request_id: The request's.
            to_replica_ids: Where to, by model.

        Raises:
            StokerError: As the agent answered; `PeerError` when it cannot be reached.
        """
        order = agent_pb2.MoveSessionsRequest(
            request_id=request_id,
            to_replica_ids=to_replica_ids,
            reason="moved by an operator",
            fence=self._fence,
        )
        with translated(f"node agent at {address}"):
            return await self._agent(address).MoveSessions(
                order, timeout=self._settings.order_timeout_seconds
            )

    async def shift_sessions(
        self, address: str, replica_id: ReplicaId, *, to_replica_id: ReplicaId, max_sessions: int, reason: str
    ) -> int:
        """Have some of a replica's sessions asked to move to another one; return how many were asked.

        Args:
            address: Of the agent of the node where they run.
            replica_id: Where they run.
            to_replica_id: Where they should go.
            max_sessions: At most so many, those cheapest to move; ≥ 1.
            reason: For people.

        Raises:
            StokerError: As the agent answered; `PeerError` when it cannot be reached.
        """
        order = agent_pb2.MoveSessionsRequest(
            replica_id=replica_id,
            to_replica_id=to_replica_id,
            max_sessions=max_sessions,
            reason=reason,
            fence=self._fence,
        )
        with translated(f"node agent at {address}"):
            answer = await self._agent(address).MoveSessions(
                order, timeout=self._settings.order_timeout_seconds
            )
        return answer.sessions

    async def describe(self, store_address: str, uri: str) -> model_pb2.CheckpointInfo:
        """Ask a store what a checkpoint is.

        Raises:
            StokerError: As the store answered; `PeerError` when it cannot be reached.
        """
        stub = checkpoint_store_pb2_grpc.CheckpointStoreStub(self._channel(store_address))
        with translated(f"checkpoint store at {store_address}"):
            return await stub.Describe(
                checkpoint_store_pb2.DescribeRequest(uri=uri), timeout=self._settings.describe_timeout_seconds
            )

    async def describe_adapter(
        self, store_address: str, uri: str, checkpoint_uri: str
    ) -> model_pb2.AdapterSpec:
        """Ask a store what an adapter is, and whether it fits a checkpoint.

        Raises:
            StokerError: As the store answered; `PeerError` when it cannot be reached.
        """
        stub = checkpoint_store_pb2_grpc.CheckpointStoreStub(self._channel(store_address))
        request = checkpoint_store_pb2.DescribeAdapterRequest(uri=uri, checkpoint_uri=checkpoint_uri)
        with translated(f"checkpoint store at {store_address}"):
            return await stub.DescribeAdapter(request, timeout=self._settings.describe_timeout_seconds)

    async def prefetch(self, store_address: str, model: ModelRecord) -> int:
        """Bring a checkpoint to a store's memory, into free room only; returns the bytes that it moved.

        Raises:
            StokerError: As the store answered; `PeerError` when it cannot be reached.
        """
        stub = checkpoint_store_pb2_grpc.CheckpointStoreStub(self._channel(store_address))
        request = checkpoint_store_pb2.PrefetchRequest(
            uri=model.checkpoint.uri,
            revision=model.checkpoint.revision,
            priority=checkpoint_store_pb2.PRIORITY_PREFETCH,
            free_room_only=True,
        )
        with translated(f"checkpoint store at {store_address}"):
            response = await stub.Prefetch(request, timeout=self._settings.prefetch_timeout_seconds)
        return sum(transfer.bytes for transfer in response.transfers)

    async def evict(self, store_address: str, model: ModelRecord) -> None:
        """Drop a checkpoint from a store's memory.

        Raises:
            StokerError: As the store answered, e.g. `InUse`; `PeerError` when it cannot be reached.
        """
        stub = checkpoint_store_pb2_grpc.CheckpointStoreStub(self._channel(store_address))
        request = checkpoint_store_pb2.EvictRequest(uri=model.checkpoint.uri)
        with translated(f"checkpoint store at {store_address}"):
            await stub.Evict(request, timeout=self._settings.order_timeout_seconds)

    async def forget(self, keep: set[str]) -> None:
        """Close channels to addresses no node has any more."""
        for address in sorted(self._channels.keys() - keep):
            await self._channels.pop(address).close()

    async def close(self) -> None:
        """Close all channels."""
        await self.forget(set())

    def _agent(self, address: str) -> agent_grpc.NodeAgentAsyncStub:
        return agent_grpc.NodeAgentStub(self._channel(address))

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = connect(address)
        return self._channels[address]
