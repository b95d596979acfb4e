"""`Migrate`: an operator moves a model's replica, or one request's sessions, to a node. A shell."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from services.controller.answer import near_names
from services.controller.cluster import Cluster
from services.controller.cluster_view.events import MoveOrdered
from services.controller.cluster_view.fleet import Standing, members_of
from services.controller.cluster_view.view import Node
from services.controller.registry import model_not_found
from services.controller.scaling.actions import Start
from services.controller.scaling.operator_moves import Join, operator_move, place_for_request, usable_node
from services.controller.settings import ControllerSettings
from stoker.errors import AlreadyExists, DeadlineExceeded, InvalidRequest, LoadFailed, NotFound, StokerError
from stoker.ids import ModelName, NodeId, ReplicaId
from stoker.v1 import controller_pb2 as pb
from stoker.v1 import node_agent_pb2

MAX_ASKED_TOGETHER = 32
"""Agents asked at a time for a request's sessions."""


async def migrate(
    cluster: Cluster, settings: ControllerSettings, request: pb.MigrateRequest
) -> pb.MigrateResponse:
    """Move what the subject names; see the proto.

    Raises:
        StokerError: Why it can't be moved; what runs goes on where it is.
    """
    if not request.subject or not request.to_node_id:
        raise InvalidRequest("a move needs a model or request, and a node", param="subject")
    to_node_id = NodeId(request.to_node_id)
    usable_node(cluster.view, to_node_id)
    if request.subject in cluster.records:
        return await _migrate_model(cluster, settings, ModelName(request.subject), to_node_id)
    return await _migrate_request(cluster, settings, request.subject, to_node_id)


async def _migrate_model(
    cluster: Cluster, settings: ControllerSettings, name: ModelName, to_node_id: NodeId
) -> pb.MigrateResponse:
    now_seconds = cluster.clock.now_seconds()
    decided = operator_move(cluster.view, name, to_node_id, now_seconds, settings.policy())
    source = decided.source.reservation
    with cluster.watching(name) as woken:
        if isinstance(decided, Join):
            cluster.apply(MoveOrdered(replica_id=source.replica_id, to=decided.to))
        else:
            cluster.order(decided.move)
        to, sessions = await _until_it_goes(cluster, settings, source.replica_id, name, woken)
    return pb.MigrateResponse(
        model=name,
        replica_id=to,
        from_replica_id=source.replica_id,
        from_node_id=source.node_id,
        sessions=sessions,
        started=not isinstance(decided, Join),
        stops_source=True,
    )


async def _until_it_goes(
    cluster: Cluster,
    settings: ControllerSettings,
    source_id: ReplicaId,
    name: ModelName,
    woken: asyncio.Event,
) -> tuple[ReplicaId, int]:
    """Return where the source's sessions go, and how many there are, once the source has been told.

    Raises:
        LoadFailed: The destination did not come; the source serves on.
        DeadlineExceeded: It takes too long; the move goes on.
    """
    to: ReplicaId | None = None
    sessions = 0
    try:
        async with asyncio.timeout(settings.acquire_timeout_seconds):
            while True:
                woken.clear()
                cluster.check_leading()
                found = {one.reservation.replica_id: one for one in members_of(cluster.view, name)}
                source = found.get(source_id)
                if source is None or source.standing is not Standing.READY:
                    if to is not None:
                        return to, sessions
                    raise LoadFailed(f"replica {source_id} of model {name} ended before it could be moved")
                sessions = source.replica.sessions if source.replica else 0
                if to is not None and source.reservation.moving_to is None:
                    raise LoadFailed(
                        f"model {name} could not be started there, its replica stays; "
                        f"`stoker explain {name}` says why"
                    )
                to = source.reservation.moving_to
                await woken.wait()
    except TimeoutError:
        raise DeadlineExceeded(
            f"the move of model {name} takes longer than {settings.acquire_timeout_seconds:g} s; "
            "it goes on: see `stoker events`"
        ) from None


async def _migrate_request(
    cluster: Cluster, settings: ControllerSettings, request_id: str, to_node_id: NodeId
) -> pb.MigrateResponse:
    targets: dict[str, str] = {
        name: found.reservation.replica_id
        for name in cluster.records
        for found in members_of(cluster.view, name)
        if found.reservation.node_id == to_node_id and found.standing is Standing.READY and not found.stale
    }
    node, found = await _asked_to_move(cluster, request_id, targets)
    if node.node_id == to_node_id:
        raise AlreadyExists(f"the request runs on {to_node_id} already")
    started = False
    if found.model not in targets:
        name = ModelName(found.model)
        to, started = await _ready_there(cluster, settings, name, to_node_id)
        targets = {found.model: to}
        found = await cluster.orders.move_sessions(node.agent_address, request_id, targets)
        if not found.replica_id:
            raise NotFound(
                f"request {request_id[:140]!r} ended or moved while model {name} was made ready on node "
                f"{to_node_id}"
            )
    return pb.MigrateResponse(
        model=found.model,
        replica_id=targets[found.model],
        from_replica_id=found.replica_id,
        from_node_id=node.node_id,
        sessions=found.sessions,
        started=started,
    )


async def _asked_to_move(
    cluster: Cluster, request_id: str, targets: Mapping[str, str]
) -> tuple[Node, node_agent_pb2.MoveSessionsResponse]:
    """Have a request's sessions asked to move; return the node where they run, and what its agent says.

    Raises:
        NotFound: They run nowhere.
    """
    nodes = [node for node in cluster.view.nodes.values() if node.connected]
    unheard: list[str] = []
    for first in range(0, len(nodes), MAX_ASKED_TOGETHER):
        part = nodes[first : first + MAX_ASKED_TOGETHER]
        answers = await asyncio.gather(
            *(cluster.orders.move_sessions(node.agent_address, request_id, targets) for node in part),
            return_exceptions=True,
        )
        for node, answer in zip(part, answers, strict=True):
            if isinstance(answer, StokerError):
                unheard.append(f"{node.node_id}: {answer.message[:140]}")
            elif isinstance(answer, BaseException):
                raise answer
            elif answer.replica_id:
                return node, answer
    near = near_names(request_id, cluster.records.keys())
    if near:
        raise model_not_found(request_id, near)
    silent = f"; not all nodes answered ({'; '.join(unheard[:4])})" if unheard else ""
    raise NotFound(f"{request_id[:140]!r} is neither a deployed model nor a request that runs{silent}")


async def _ready_there(
    cluster: Cluster, settings: ControllerSettings, name: ModelName, to_node_id: NodeId
) -> tuple[ReplicaId, bool]:
    """Return a ready replica of a model on a node, and whether it was started for this; waits until it is.

    Raises:
        StokerError: There can't be one; the request goes on where it is.
    """
    with cluster.watching(name) as woken:
        decided = place_for_request(
            cluster.view, name, to_node_id, cluster.clock.now_seconds(), settings.policy()
        )
        if isinstance(decided, Start):
            cluster.order(decided)
        has_begun = not isinstance(decided, Start)
        try:
            async with asyncio.timeout(settings.acquire_timeout_seconds):
                while True:
                    woken.clear()
                    cluster.check_leading()
                    there = [
                        found
                        for found in members_of(cluster.view, name)
                        if found.reservation.node_id == to_node_id
                        and found.standing in (Standing.READY, Standing.STARTING)
                    ]
                    ready = [found for found in there if found.standing is Standing.READY]
                    if ready:
                        return ready[0].reservation.replica_id, isinstance(decided, Start)
                    if has_begun and not there:
                        raise LoadFailed(
                            f"model {name} could not be started on node {to_node_id}, the request stays "
                            f"where it is; `stoker explain {name}` says why"
                        )
                    has_begun = has_begun or bool(there)
                    await woken.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"model {name} was not ready on node {to_node_id} within "
                f"{settings.acquire_timeout_seconds:g} s; the request stays where it is, the start goes on"
            ) from None
