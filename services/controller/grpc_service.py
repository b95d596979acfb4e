"""The `Controller` service: protos in, protos out; decisions are elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import grpc

from services.controller.answer import Answer, Failed, Queued, Ready, Starting, Unknown, answer, near_names
from services.controller.cluster import Cluster
from services.controller.cluster_view.fleet import Member
from services.controller.cluster_view.index import index_of, reservations_on
from services.controller.cluster_view.view import Scheduling
from services.controller.leadership import Leadership
from services.controller.migrate import migrate
from services.controller.placement.deadline import Late, late
from services.controller.registry import model_not_found
from services.controller.settings import ControllerSettings
from services.controller.store_peers import StorePeers
from services.controller.wire import model_message, route_replica
from stoker import __version__
from stoker.errors import (
    BY_CODE,
    CannotMeetDeadline,
    DeadlineExceeded,
    InvalidRequest,
    LoadFailed,
    NotFound,
    StokerError,
)
from stoker.ids import ModelName, NodeId, ReplicaId
from stoker.v1 import controller_pb2 as pb
from stoker.v1 import controller_pb2_grpc, node_agent_pb2, start_pb2

Context = grpc.aio.ServicerContext[Any, Any]
RETRY_AFTER_LIMIT_SECONDS = 60.0
"""Clients obey no longer `Retry-After` (openai-python)."""
MAX_FAILED_REPLICAS = 64
SCHEDULINGS = {
    Scheduling.OPEN: pb.NODE_SCHEDULING_OPEN,
    Scheduling.CORDONED: pb.NODE_SCHEDULING_CORDONED,
    Scheduling.DRAINED: pb.NODE_SCHEDULING_DRAINED,
}


class ControllerService(controller_pb2_grpc.ControllerServicer):
    """Serves one controller; every call but GetClusterStatus needs it to lead."""

    def __init__(self, leadership: Leadership, settings: ControllerSettings) -> None:
        self._leadership = leadership
        self._settings = settings
        self._streams: dict[NodeId, object] = {}
        self._store_peers = StorePeers()

    async def Deploy(self, request: pb.DeployRequest, context: Context) -> pb.DeployResponse:  # noqa: N802 - named by the proto
        """See the proto."""
        del context
        term = self._leadership.term()
        deployed = await term.registry.deploy(
            request.spec, create_only=request.create_only, dry_run=request.dry_run
        )
        cluster = term.cluster
        return pb.DeployResponse(
            model=model_message(cluster.view, deployed.record, cluster.clock.now_seconds()),
            created=deployed.created,
            changed=deployed.changed,
        )

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Context) -> pb.DeleteModelResponse:  # noqa: N802 - named by the proto
        """See the proto."""
        del context
        await self._leadership.term().registry.delete(ModelName(request.name))
        return pb.DeleteModelResponse()

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802 - named by the proto
        """See the proto."""
        del request, context
        cluster = self._leadership.term().cluster
        now_seconds = cluster.clock.now_seconds()
        records = [cluster.records[name] for name in sorted(cluster.records)]
        return pb.ListModelsResponse(
            models=[model_message(cluster.view, record, now_seconds) for record in records]
        )

    async def ListReplicas(  # noqa: N802 - named by the proto
        self, request: pb.ListReplicasRequest, context: Context
    ) -> pb.ListReplicasResponse:
        """See the proto."""
        del context
        cluster = self._leadership.term().cluster
        replicas = []
        for node_id in sorted(cluster.reports):
            for reported in sorted(cluster.reports[node_id].replicas, key=lambda found: found.replica_id):
                if request.model in ("", reported.model):
                    replica = node_agent_pb2.Replica()
                    replica.CopyFrom(reported)
                    replica.node_id = node_id
                    replicas.append(replica)
        return pb.ListReplicasResponse(replicas=replicas)

    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesResponse:  # noqa: N802 - named by the proto
        """See the proto."""
        del request, context
        cluster = self._leadership.term().cluster
        now_seconds = cluster.clock.now_seconds()
        return pb.ListNodesResponse(
            nodes=[
                pb.Node(
                    report=cluster.reports[node_id],
                    reachable=cluster.view.nodes[node_id].reachable,
                    last_seen_seconds=now_seconds - cluster.view.nodes[node_id].last_seen_seconds,
                    scheduling=SCHEDULINGS[cluster.view.scheduling.get(node_id, Scheduling.OPEN)],
                )
                for node_id in sorted(found for found in cluster.reports if found in cluster.view.nodes)
            ]
        )

    async def GetClusterStatus(  # noqa: N802 - named by the proto
        self, request: pb.GetClusterStatusRequest, context: Context
    ) -> pb.ClusterStatus:
        """See the proto."""
        del request, context
        status = pb.ClusterStatus(
            version=__version__,
            leader=self._leadership.leader_address,
            leading=self._leadership.leading.is_set(),
            state_backend="embedded" if self._settings.state.startswith("embedded:") else "etcd",
        )
        if status.leading:
            cluster = self._leadership.term().cluster
            status.models = len(cluster.records)
            status.nodes = len(cluster.view.nodes)
            status.replicas = sum(len(node.replicas) for node in cluster.view.nodes.values())
        return status

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:  # noqa: N802 - named by the proto
        """See the proto."""
        del context
        cluster = self._leadership.term().cluster
        decisions = cluster.decisions.explain(request.subject, request.limit)
        if not decisions and request.subject not in cluster.records:
            raise NotFound(
                f"no decision about a model or for a request {request.subject[:140]!r} is remembered; "
                "a request that found its model ready needed none",
                param="subject",
            )
        return pb.ExplainResponse(decisions=decisions)

    async def SetNodeScheduling(  # noqa: N802 - named by the proto
        self, request: pb.SetNodeSchedulingRequest, context: Context
    ) -> pb.SetNodeSchedulingResponse:
        """See the proto."""
        del context
        cluster = self._leadership.term().cluster
        if not request.node_id or "/" in request.node_id:
            raise InvalidRequest(f"node_id {request.node_id!r} names no node", param="node_id")
        scheduling = next(
            (ours for ours, theirs in SCHEDULINGS.items() if theirs == request.scheduling), Scheduling.OPEN
        )
        node_id = NodeId(request.node_id)
        await cluster.set_scheduling(node_id, scheduling)
        return pb.SetNodeSchedulingResponse(
            replicas=len(reservations_on(cluster.view, index_of(cluster.view), node_id)),
            absent=node_id not in cluster.view.nodes,
        )

    async def Migrate(self, request: pb.MigrateRequest, context: Context) -> pb.MigrateResponse:  # noqa: N802 - named by the proto
        """See the proto."""
        del context
        term = self._leadership.term()
        return await migrate(term.cluster, self._settings, request)

    async def WatchEvents(  # noqa: N802 - named by the proto
        self, request: pb.WatchEventsRequest, context: Context
    ) -> AsyncIterator[pb.ClusterEvent]:
        """See the proto."""
        del context
        cluster = self._leadership.term().cluster
        async with aclosing(cluster.events.read(request.limit, follow=request.follow)) as events:
            async for event in events:
                yield event

    async def WatchRoutes(  # noqa: N802 - named by the proto
        self, request: pb.WatchRoutesRequest, context: Context
    ) -> AsyncIterator[pb.RoutesUpdate]:
        """See the proto."""
        del request, context
        cluster = self._leadership.term().cluster
        async with aclosing(cluster.routes.watch()) as updates:
            async for update in updates:
                cluster.check_leading()
                yield update

    async def Acquire(self, request: pb.AcquireRequest, context: Context) -> AsyncIterator[pb.AcquireEvent]:  # noqa: N802 - named by the proto
        """See the proto."""
        del context
        cluster = self._leadership.term().cluster
        if request.model not in cluster.records:
            raise model_not_found(request.model, near_names(request.model, cluster.records.keys()))
        if len(request.failed_replica_ids) > MAX_FAILED_REPLICAS:
            raise InvalidRequest(f"failed_replica_ids names more than {MAX_FAILED_REPLICAS} replicas")
        limit_seconds = self._settings.acquire_timeout_seconds
        timeout_seconds = (
            min(request.timeout_seconds, limit_seconds) if request.timeout_seconds > 0 else limit_seconds
        )
        if request.deadline_seconds > 0:
            timeout_seconds = min(timeout_seconds, request.deadline_seconds)
        async with aclosing(_acquire(cluster, request, timeout_seconds)) as events:
            async for event in events:
                yield event

    async def ReportNode(  # noqa: N802 - named by the proto
        self, request_iterator: AsyncIterator[node_agent_pb2.NodeReport], context: Context
    ) -> AsyncIterator[pb.ReportAck]:
        """See the proto. The latest stream of a node counts; the end of an older one means nothing."""
        del context
        term = self._leadership.term()
        me = object()
        mine: NodeId | None = None
        told_version = -1
        try:
            async for report in request_iterator:
                term.cluster.check_leading()
                if not report.node_id:
                    raise InvalidRequest("report names no node", param="node_id")
                mine = NodeId(report.node_id)
                self._streams[mine] = me
                term.cluster.report(report)
                self._store_peers.reported(report)
                ack = pb.ReportAck(
                    sequence=report.sequence,
                    fence=term.fence,
                    warm_workers=term.forecaster.warm_workers(mine),
                )
                if told_version != self._store_peers.version:
                    told_version = self._store_peers.version
                    ack.store_peers.CopyFrom(self._store_peers.others(mine))
                yield ack
        finally:
            if mine is not None and self._streams.get(mine) is me:
                del self._streams[mine]
                self._store_peers.disconnected(mine)
                term.cluster.disconnected(mine)


async def _acquire(
    cluster: Cluster, request: pb.AcquireRequest, timeout_seconds: float
) -> AsyncGenerator[pb.AcquireEvent, None]:
    """Tell what is new until a replica is ready; leaving at any point leaves the start alone."""
    name = ModelName(request.model)
    since_seconds = cluster.clock.now_seconds()
    if request.deadline_seconds > 0:
        hopeless = cluster.decline_if_late(name, since_seconds + request.deadline_seconds)
        if hopeless is not None:
            raise _cannot_meet(hopeless, request.model, request.deadline_seconds)
    failed = frozenset(ReplicaId(replica_id) for replica_id in request.failed_replica_ids)
    told: pb.AcquireEvent | None = None
    waited = False
    waits_seconds = request.waited_seconds, request.earlier_waits_seconds
    with cluster.waiting(name, failed, request.request_id, *waits_seconds) as woken:
        while True:
            woken.clear()
            cluster.check_leading()
            now_seconds = cluster.clock.now_seconds()
            found = answer(cluster.view, name, since_seconds=since_seconds, now_seconds=now_seconds)
            if isinstance(found, Ready):
                yield _ready(cluster, found.member, waited=waited)
                return
            _check_deadline(found, request, since_seconds, now_seconds)
            event = _progress(found, name, now_seconds)
            if told is None or _differs(told, event):
                yield event
                told = event
            waited = True
            remaining_seconds = since_seconds + timeout_seconds - cluster.clock.now_seconds()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, remaining_seconds)):
                    await woken.wait()
                    continue
            raise DeadlineExceeded(
                f"model {name} had no ready replica within {timeout_seconds:g} s: {_why(found)}",
                retry_after_seconds=_retry_after_seconds(found, now_seconds),
            )


def _check_deadline(
    found: Answer, request: pb.AcquireRequest, since_seconds: float, now_seconds: float
) -> None:
    """Refuse a request that what it waits for comes too late for; the start goes on.

    Raises:
        CannotMeetDeadline: With the estimate.
    """
    if request.deadline_seconds <= 0:
        return
    found_late = late(found, now_seconds=now_seconds, due_seconds=since_seconds + request.deadline_seconds)
    if found_late is not None:
        left_seconds = max(0.0, since_seconds + request.deadline_seconds - now_seconds)
        raise _cannot_meet(found_late, request.model, left_seconds)


def _cannot_meet(found: Late, model: str, left_seconds: float) -> CannotMeetDeadline:
    """Return the refusal, with the estimate."""
    at_best, then = "", "its start goes on: ask again then, or allow more time"
    if not found.ordered:
        at_best = f" at best, from {found.tier},"
        then = "it was not started: allow more time, or keep a replica (min_replicas)"
    return CannotMeetDeadline(
        f"model {model} is expected to be ready in {found.ready_seconds:.2f} s{at_best} and the request is "
        f"due in {left_seconds:.2f} s; {then}",
        retry_after_seconds=min(RETRY_AFTER_LIMIT_SECONDS, max(1.0, found.ready_seconds)),
        details={"estimate_seconds": round(found.ready_seconds, 3)},
    )


def _progress(found: Answer, name: ModelName, now_seconds: float) -> pb.AcquireEvent:
    """Return the event that says what is waited for, or raise why waiting is in vain."""
    match found:
        case Starting(member=member):
            replica = member.replica
            starting = pb.AcquireStarting(
                replica_id=member.reservation.replica_id,
                node_id=member.reservation.node_id,
                predicted_seconds=member.reservation.predicted_seconds,
                elapsed_seconds=now_seconds - member.reservation.seen_seconds,
                loaded_fraction=replica.loaded_fraction if replica else 0.0,
            )
            return pb.AcquireEvent(starting=starting)
        case Queued(reason=reason):
            return pb.AcquireEvent(queued=pb.AcquireQueued(reason=reason))
        case Failed():
            raise _error(found)
        case Unknown(near=near):
            raise model_not_found(name, near)
        case Ready():
            raise AssertionError("a ready replica is not progress")


def _differs(told: pb.AcquireEvent, event: pb.AcquireEvent) -> bool:
    """Tell whether an event says more than how much time has passed."""
    if told.WhichOneof("event") != event.WhichOneof("event"):
        return True
    if event.HasField("queued"):
        return told.queued.reason != event.queued.reason
    before, now = told.starting, event.starting
    return (before.replica_id, before.loaded_fraction) != (now.replica_id, now.loaded_fraction)


def _ready(cluster: Cluster, member: Member, *, waited: bool) -> pb.AcquireEvent:
    ready = pb.AcquireReady(replica=route_replica(member))
    if waited:
        ready.timings.CopyFrom(_timings(cluster, member))
        ready.timings.predicted_seconds = member.reservation.predicted_seconds
    return pb.AcquireEvent(ready=ready)


def _timings(cluster: Cluster, member: Member) -> start_pb2.StartTimings:
    report = cluster.reports.get(member.reservation.node_id)
    for replica in report.replicas if report else ():
        if replica.replica_id == member.reservation.replica_id:
            return replica.timings
    return start_pb2.StartTimings()


def _error(failed: Failed) -> StokerError:
    cls = BY_CODE.get(failed.code, LoadFailed)
    retry_after_seconds = failed.retry_after_seconds
    if retry_after_seconds is not None:
        retry_after_seconds = min(retry_after_seconds, RETRY_AFTER_LIMIT_SECONDS)
    return cls(failed.message, retry_after_seconds=retry_after_seconds)


def _why(found: Answer) -> str:
    match found:
        case Starting(member=member):
            return (
                f"replica {member.reservation.replica_id} on {member.reservation.node_id} is still starting"
            )
        case Queued(reason=reason):
            return reason
        case _:
            return "nothing came of it"


def _retry_after_seconds(found: Answer, now_seconds: float) -> float:
    """Return when a start on its way should be done, else a while; at least 1 and at most 60 seconds."""
    if isinstance(found, Starting):
        reservation = found.member.reservation
        left_seconds = reservation.seen_seconds + reservation.predicted_seconds - now_seconds
        return min(RETRY_AFTER_LIMIT_SECONDS, max(1.0, left_seconds))
    return 5.0
