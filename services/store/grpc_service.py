"""The `CheckpointStore` gRPC service: what controllers, gateways and operators ask a store."""

# ruff: noqa: ARG002 - gRPC hands every method its request and context, needed or not

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from services.store.adapters import refuse_adapter
from services.store.catalog import Catalog, CatalogEntry
from services.store.copies_service import CopiesService
from services.store.disk_cache.cache import DiskCache
from services.store.loads import Loads
from services.store.messages import DRAM, store_status, transfers, urgency_of
from services.store.peers.service import Peers
from services.store.pool.resident import Phase
from services.store.pulls import Pulls
from stoker.checkpoint.small_files import read_small_files
from stoker.clock import Clock
from stoker.errors import InvalidRequest
from stoker.units import MIB
from stoker.v1 import checkpoint_store_pb2 as pb
from stoker.v1 import checkpoint_store_pb2_grpc, model_pb2, start_pb2

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["CheckpointStore"].full_name
PIECE_BYTES = 3 * MIB
"""Of a small file in one message: under the 4 MiB that a message may have."""

STATUS_INTERVAL_SECONDS = 0.1
Context = Any  # grpc.aio.ServicerContext; handlers here never touch it


class CheckpointStoreService(CopiesService, checkpoint_store_pb2_grpc.CheckpointStoreServicer):
    """Answers from the catalog and the pool; errors are mapped by the server's interceptor."""

    def __init__(  # noqa: PLR0913 - the parts it answers for
        self,
        *,
        catalog: Catalog,
        loads: Loads,
        clock: Clock,
        pulls: Pulls,
        cache: DiskCache | None,
        peers: Peers | None = None,
        attach_socket: str = "",
        described: Callable[[CatalogEntry], None] | None = None,
        expected: Mapping[str, float] | None = None,
    ) -> None:
        """Take what answers.

        Args:
            catalog: Opens checkpoints.
            loads: The pool.
            clock: For the pace of WatchStatus.
            pulls: What is on its way to the disk cache.
            cache: The disk cache, if there is one.
            peers: What is shared with other stores, if anything is.
            attach_socket: Path of the attach socket, to be told.
            described: Told of each checkpoint that is described.
            expected: Of far tiers, bytes per second until something was moved.
        """
        super().__init__(catalog=catalog, pulls=pulls, cache=cache)
        self._catalog = catalog
        self._loads = loads
        self._clock = clock
        self._peers = peers
        self._attach_socket = attach_socket
        self._described = described
        self._expected = expected or {}

    async def Describe(  # noqa: N802 - the method's name in the contract
        self, request: pb.DescribeRequest, context: Context
    ) -> model_pb2.CheckpointInfo:
        """Read headers and config; touch no weights."""
        entry = await self._catalog.open(request.uri)
        refuse_adapter(entry)
        if self._described is not None:
            self._described(entry)
        return entry.info

    async def DescribeAdapter(  # noqa: N802 - the method's name in the contract
        self, request: pb.DescribeAdapterRequest, context: Context
    ) -> model_pb2.AdapterSpec:
        """Read an adapter's config and header, and compare its shapes with the checkpoint's."""
        return await self._catalog.describe_adapter(request.uri, checkpoint_uri=request.checkpoint_uri)

    async def ReadSmallFiles(  # noqa: N802 - the method's name in the contract
        self, request: pb.ReadSmallFilesRequest, context: Context
    ) -> AsyncIterator[pb.SmallFile]:
        """Stream the small files, large ones in pieces."""
        entry = await self._catalog.open(request.uri, revision=request.revision)
        files = await asyncio.to_thread(read_small_files, entry.index.path)
        for name, content in files.items():
            for at in range(0, max(1, len(content)), PIECE_BYTES):
                piece = content[at : at + PIECE_BYTES]
                yield pb.SmallFile(name=name, content=piece, last=at + len(piece) == len(content))

    async def Prefetch(  # noqa: N802 - the method's name in the contract
        self, request: pb.PrefetchRequest, context: Context
    ) -> pb.PrefetchResponse:
        """Bring a checkpoint to the pool; the load goes on when the caller leaves."""
        began_seconds = self._clock.now_seconds()
        entry = await self._catalog.open(request.uri, revision=request.revision)
        there = {each.entry.identity for each in self._loads.residents() if each.phase is Phase.READY}
        resident = await self._loads.load(
            entry, urgency_of(request.priority), free_room_only=request.free_room_only
        )
        moved = transfers(resident.moved)
        if entry.identity in there:
            seconds = self._clock.now_seconds() - began_seconds
            moved = [start_pb2.TierTransfer(tier=DRAM, bytes=entry.index.weight_bytes, seconds=seconds)]
        return pb.PrefetchResponse(checkpoint=entry.info, transfers=moved)

    async def Evict(  # noqa: N802 - the method's name in the contract
        self, request: pb.EvictRequest, context: Context
    ) -> pb.EvictResponse:
        """Give up a checkpoint's chunks; refused while somebody holds it."""
        return pb.EvictResponse(freed_bytes=self._loads.evict(await self._catalog.known_as(request.uri)))

    async def Pin(  # noqa: N802 - the method's name in the contract
        self, request: pb.PinRequest, context: Context
    ) -> pb.PinResponse:
        """Bring a checkpoint to the pool and keep it there, or let it go again."""
        if request.pinned:
            self._loads.pin(await self._catalog.open(request.uri))
        else:
            self._loads.unpin(await self._catalog.known_as(request.uri))
        return pb.PinResponse()

    async def GetStatus(  # noqa: N802 - the method's name in the contract
        self, request: pb.GetStatusRequest, context: Context
    ) -> pb.StoreStatus:
        """Return what the store holds."""
        return self._status()

    async def WatchStatus(  # noqa: N802 - the method's name in the contract
        self, request: pb.GetStatusRequest, context: Context
    ) -> AsyncIterator[pb.StoreStatus]:
        """Return it at once and after every change, at most ten times a second."""
        with self._loads.changes.watched() as changed:
            while True:
                changed.clear()
                yield self._status()
                await changed.wait()
                await self._clock.sleep(STATUS_INTERVAL_SECONDS)

    async def SetPeers(  # noqa: N802 - the method's name in the contract
        self, request: pb.SetPeersRequest, context: Context
    ) -> pb.SetPeersResponse:
        """Link to these stores."""
        if self._peers is None:
            raise InvalidRequest("this store shares nothing with others; set STOKER_STORE_PEER_ADDRESS")
        self._peers.set_peers(request.addresses)
        return pb.SetPeersResponse()

    def _status(self) -> pb.StoreStatus:
        status = store_status(self._loads, self._catalog.entries())
        status.attach_socket = self._attach_socket
        measured = {bandwidth.stage for bandwidth in status.bandwidths}
        for tier, rate in self._expected.items():
            if tier not in measured:
                status.bandwidths.add(stage=tier, bytes_per_second=rate)
        if self._peers is not None:
            status.peer_address = self._peers.address
        return status
