"""The gRPC surface `stoker.v1.NodeAgent`; errors are mapped by `stoker.rpc`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from services.node_agent.host import Host
from services.node_agent.own_log import read_own_log
from services.node_agent.sessions.kv_shipping import KvShipping
from services.node_agent.sessions.linked_sessions import serve_link
from services.node_agent.sessions.session_listener import SessionListener
from services.node_agent.sessions.session_moves import ask_to_move
from services.node_agent.sessions.session_sources import Watch, open_source
from stoker import log
from stoker.ids import ReplicaId
from stoker.v1.node_agent_pb2 import (
    FetchKvRequest,
    FetchKvResponse,
    FindSessionsRequest,
    FindSessionsResponse,
    GetReportRequest,
    LogLine,
    MoveSessionsRequest,
    MoveSessionsResponse,
    NodeReport,
    ReadLogsRequest,
    ReleaseSessionRequest,
    ReleaseSessionResponse,
    StartReplicaRequest,
    StartReplicaResponse,
    StopReplicaRequest,
    StopReplicaResponse,
)
from stoker.v1.node_agent_pb2_grpc import NodeAgentServicer
from stoker.v1.session_kv_pb2 import HoldSessionRequest, HoldSessionResponse, ReadKvRequest
from stoker.v1.session_link_pb2 import LinkSessionsEvent, LinkSessionsRequest
from stoker.v1.session_pb2 import GenerateRequest

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_TAIL_LINES = 100


class Servicer(NodeAgentServicer):
    """Serves orders, sessions, reports and logs of one host.

    Args:
        host: The workers and replicas.
        report: Builds a report of this moment.
        listener: Where gateways' sessions come in beside gRPC.
    """

    def __init__(self, host: Host, report: Callable[[], NodeReport], listener: SessionListener) -> None:
        self._host = host
        self._listener = listener
        self._shipping = KvShipping(host.worker_of, host.moves)
        self._report = report

    async def StartReplica(  # noqa: N802 - the name of the rpc
        self, request: StartReplicaRequest, context: Context
    ) -> StartReplicaResponse:
        """See node_agent.proto."""
        del context
        self._host.order_start(request)
        return StartReplicaResponse()

    async def StopReplica(  # noqa: N802 - the name of the rpc
        self, request: StopReplicaRequest, context: Context
    ) -> StopReplicaResponse:
        """See node_agent.proto."""
        del context
        self._host.order_stop(request)
        return StopReplicaResponse()

    async def Generate(  # type: ignore[override]  # noqa: N802 - writes itself, so that a cancel lands here
        self, request: GenerateRequest, context: Context
    ) -> None:
        """See node_agent.proto."""
        await context.send_initial_metadata(())  # nothing is read before it
        await self._generate(request, context)

    async def LinkSessions(  # noqa: N802 - the name of the rpc
        self, request: LinkSessionsRequest, context: Context
    ) -> AsyncIterator[LinkSessionsEvent]:
        """See node_agent.proto."""
        del request, context
        async with aclosing(serve_link(self._listener, partial(open_source, self._host))) as events:
            async for event in events:
                yield event

    async def _generate(self, request: GenerateRequest, context: Context) -> None:
        with log.bind(request_id=request.request_id, session_id=request.session_id):
            if request.keep_seconds > 0:
                await self._generate_kept(request, context)
                return
            async with self._host.session(request) as session:
                watch = Watch(self._host, request)
                while True:
                    event = await session.next()
                    watch.saw(event)
                    await context.write(event)
                    if event.finish_reason:
                        return

    async def _generate_kept(self, request: GenerateRequest, context: Context) -> None:
        """As `_generate`, for a session that outlives this call."""
        watch = Watch(self._host, request)
        async with aclosing(self._host.generate_kept(request)) as events:
            async for event in events:
                watch.saw(event)
                await context.write(event)

    async def FindSessions(  # noqa: N802 - the name of the rpc
        self, request: FindSessionsRequest, context: Context
    ) -> FindSessionsResponse:
        """See node_agent.proto."""
        del context
        return FindSessionsResponse(sessions=self._host.find_kept(request.session_ids))

    async def ReleaseSession(  # noqa: N802 - the name of the rpc
        self, request: ReleaseSessionRequest, context: Context
    ) -> ReleaseSessionResponse:
        """See node_agent.proto."""
        del context
        self._host.release_kept(request.session_id, request.epoch)
        return ReleaseSessionResponse()

    async def GetReport(  # noqa: N802 - the name of the rpc
        self, request: GetReportRequest, context: Context
    ) -> NodeReport:
        """See node_agent.proto."""
        del request, context
        return self._report()

    async def FetchKv(  # noqa: N802 - the name of the rpc
        self, request: FetchKvRequest, context: Context
    ) -> FetchKvResponse:
        """See node_agent.proto."""
        del context
        with log.bind(session_id=request.session_id):
            return await self._shipping.fetch(request)

    async def ReadKv(  # type: ignore[override]  # noqa: N802 - the name of the rpc
        self, request: ReadKvRequest, context: Context
    ) -> AsyncIterator[bytes]:
        """See node_agent.proto; parts are handed on in their wire form."""
        del context
        with log.bind(session_id=request.session_id):
            async with aclosing(self._shipping.read(request)) as parts:
                async for part in parts:
                    yield part

    async def HoldSession(  # noqa: N802 - the name of the rpc
        self, request: HoldSessionRequest, context: Context
    ) -> HoldSessionResponse:
        """See node_agent.proto."""
        del context
        with log.bind(session_id=request.session_id):
            return await self._shipping.hold(request)

    async def MoveSessions(  # noqa: N802 - the name of the rpc
        self, request: MoveSessionsRequest, context: Context
    ) -> MoveSessionsResponse:
        """See node_agent.proto."""
        del context
        host = self._host
        return ask_to_move(request, host.relays(), highest_fence=host.state.highest_fence)

    async def ReadLogs(  # noqa: N802 - the name of the rpc
        self, request: ReadLogsRequest, context: Context
    ) -> AsyncIterator[LogLine]:
        """See node_agent.proto."""
        del context
        tail_lines = request.tail_lines or DEFAULT_TAIL_LINES
        if request.replica_id:
            lines = self._host.read_logs(
                ReplicaId(request.replica_id), tail_lines=tail_lines, follow=request.follow
            )
        else:
            lines = read_own_log(tail_lines=tail_lines, follow=request.follow)
        async for line in lines:
            yield LogLine(text=line)
