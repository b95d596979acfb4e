"""Keys and values of moving sessions between two node agents: parts are handed on as they come, unopened.

source worker → its agent (`read`) → this agent (`fetch`) → this node's worker. gRPC's windows hold every
stage back to the pace of the next one, so an agent holds a message or two; what they carry is checked at the
end, by the worker. The source's sessions never wait for any of it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

from grpc.aio import Channel, UnaryStreamMultiCallable

from services.node_agent import metrics
from stoker import log
from stoker.errors import CapacityError, StokerError
from stoker.rpc import cancelled_after, connect, translated
from stoker.v1.node_agent_pb2 import FetchKvRequest, FetchKvResponse
from stoker.v1.session_kv_pb2 import HoldSessionRequest, HoldSessionResponse, ReadKvRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.node_agent.sessions.move_watch import MoveWatch
    from services.node_agent.workers.worker_link import WorkerLink

MAX_SHIPMENTS = 8
"""At once, in each direction; a session that finds no room is computed from its tokens."""
MAX_LAST_SHIPMENTS = 32
"""Of sessions that stand still meanwhile, for a token or two: these wait for no others."""
SHIP_TIMEOUT_SECONDS = 120.0
"""Of one call; a silent peer is found sooner, by keep-alive."""

HOLD_TIMEOUT_SECONDS = 5.0
"""Until a worker's step ends, after which its sessions can be held."""


class KvShipping:
    """Ships keys and values from and to the workers of this host.

    Args:
        worker_of: The worker of a replica that serves here; raises ReplicaGone.
        moves: Measures moves to this node.
    """

    def __init__(self, worker_of: Callable[[str], WorkerLink], moves: MoveWatch) -> None:
        self._worker_of = worker_of
        self._moves = moves
        self._running: Counter[tuple[str, bool]] = Counter()

    async def fetch(self, request: FetchKvRequest) -> FetchKvResponse:
        """Bring a session's keys and values to a worker here.

        Raises:
            KvUnavailable: They can't be shipped: between these workers, or not now.
            ReplicaGone, CapacityError: There is nobody or no room here for them, or there.
            PeerError: The other agent, or the worker, can't be reached.
        """
        link = self._worker_of(request.replica_id)
        wanted = ReadKvRequest(
            session_id=request.session_id,
            replica_id=request.from_replica_id,
            epoch=request.from_epoch,
            from_token=request.from_token,
            within_seconds=request.within_seconds,
            hold_seconds=request.hold_seconds,
        )
        began_seconds = time.monotonic()
        with self._counted("in", is_last=request.hold_seconds > 0):
            async with (
                connect(request.from_agent_address) as channel,
                aclosing(_parts(channel, wanted, request.from_agent_address)) as parts,
            ):
                written = await link.write_kv(parts, timeout_seconds=SHIP_TIMEOUT_SECONDS)
        seconds = time.monotonic() - began_seconds
        metrics.KV_BYTES.labels("in").inc(written.data_bytes)
        self._moves.shipped(request.session_id, written.data_bytes, seconds)
        return FetchKvResponse(
            tokens=written.tokens,
            data_bytes=written.data_bytes,
            seconds=seconds,
            held_tokens=written.held_tokens,
        )

    async def read(self, request: ReadKvRequest) -> AsyncGenerator[bytes]:
        """Yield the parts of a session that runs here, `KvPart`s as they came; raises as `fetch`."""
        link = self._worker_of(request.replica_id)
        with self._counted("out", is_last=request.hold_seconds > 0):
            async with aclosing(link.read_kv(request, timeout_seconds=SHIP_TIMEOUT_SECONDS)) as parts:
                async for part in parts:
                    metrics.KV_BYTES.labels("out").inc(len(part))
                    yield part

    async def hold(self, request: HoldSessionRequest) -> HoldSessionResponse:
        """Have a session that runs here stand still for the last round of its move, or go on.

        Raises:
            ReplicaGone, NotFound, Fenced: It does not run here under this epoch.
            PeerError: The worker can't be reached, or not in time.
        """
        return await self._worker_of(request.replica_id).hold(request, timeout_seconds=HOLD_TIMEOUT_SECONDS)

    @contextmanager
    def _counted(self, direction: str, *, is_last: bool) -> Iterator[None]:
        running, limit = (direction, is_last), MAX_LAST_SHIPMENTS if is_last else MAX_SHIPMENTS
        if self._running[running] >= limit:
            raise CapacityError(
                f"this node ships keys and values of {limit} sessions already",
                retry_after_seconds=1.0,
            )
        self._running[running] += 1
        try:
            yield
        except StokerError as error:
            metrics.KV_FAILURES.labels(direction, error.code).inc()
            log.get().info(
                "kv.not_shipped", direction=direction, error_code=error.code, message=error.message
            )
            raise
        finally:
            self._running[running] -= 1


async def _parts(channel: Channel, wanted: ReadKvRequest, address: str) -> AsyncGenerator[bytes]:
    read: UnaryStreamMultiCallable[ReadKvRequest, bytes] = channel.unary_stream(
        "/stoker.v1.NodeAgent/ReadKv", request_serializer=ReadKvRequest.SerializeToString
    )
    call = read(wanted, timeout=SHIP_TIMEOUT_SECONDS)
    with translated(f"node agent at {address}"), cancelled_after(call) as parts:
        async for part in parts:
            yield part
