"""What the leader does about its decisions: first folded into the view, then ordered and written by tasks.

An order that fails is undone here: slots are given back, and a stop that was refused is forgotten. An error
of the state ends the term (`cluster`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.controller import metrics
from services.controller.cluster_view.events import (
    MoveOrdered,
    NodeDisconnected,
    NodeForgotten,
    Released,
    Releasing,
    Reserved,
    StopOrdered,
    StopRefused,
)
from services.controller.cluster_view.view import Reservation
from services.controller.records import ModelRecord, ReservationRecord
from services.controller.scaling.actions import Action, Migrate, Note, Release, Start, Stop, start_failed
from stoker import log
from stoker.background import Background
from stoker.errors import CapacityError, DeadlineExceeded, Fenced, PeerError, ReplicaBusy, StokerError
from stoker.ids import ReplicaId, new_id

if TYPE_CHECKING:
    from services.controller.cluster import Cluster


class Effects:
    """The hands of a cluster's leader, for one term."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def begin(self, action: Action, tasks: Background) -> None:
        """Fold what was decided and begin to do it."""
        match action:
            case Note(event=event):
                if isinstance(event, NodeForgotten):
                    self._cluster.reports.pop(event.node_id, None)
                    self._cluster.tell("node.forgotten", node_id=event.node_id)
                self._cluster.apply(event)
            case Start():
                replica_id = self._begin_start(action, tasks)
                self._cluster.decisions.started(action.model, replica_id)
            case Migrate():
                self._begin_move(action, tasks)
            case Stop(replica_id=replica_id, node_id=node_id, for_model=for_model):
                now_seconds = self._cluster.clock.now_seconds()
                self._cluster.apply(
                    StopOrdered(
                        replica_id=replica_id, now_seconds=now_seconds, for_model=for_model, node_id=node_id
                    )
                )
                tasks.start(self._stop(action), name=f"stop-{replica_id}")
            case Release(replica_id=replica_id, reason=reason):
                self._cluster.apply(Releasing(replica_id=replica_id))
                tasks.start(self._release(replica_id, reason), name=f"release-{replica_id}")

    def _begin_move(self, move: Migrate, tasks: Background) -> None:
        """Start the replica anew at its destination; `reconcile` drains the source once that is ready."""
        to = self._begin_start(move.start, tasks)
        self._cluster.apply(MoveOrdered(replica_id=move.replica_id, to=to, for_model=move.for_model))
        self._cluster.tell("replica.moving", replica_id=move.replica_id, to=to, to_node_id=move.to_node_id)

    def _begin_start(self, start: Start, tasks: Background) -> ReplicaId:
        record = ReservationRecord(
            replica_id=ReplicaId(new_id("rep")),
            model=start.model,
            node_id=start.node_id,
            devices=start.devices,
            runtime=start.runtime,
            predicted_seconds=start.estimate.total_seconds,
            created_unix_seconds=self._cluster.clock.unix_seconds(),
        )
        decided_seconds = self._cluster.clock.now_seconds()
        self._cluster.apply(Reserved(reservation=reservation_of(record, decided_seconds, adopted=False)))
        tasks.start(
            self._start(start, record, self._cluster.records[start.model], decided_seconds),
            name=f"start-{record.replica_id}",
        )
        return record.replica_id

    async def _start(
        self, start: Start, record: ReservationRecord, model: ModelRecord, decided_seconds: float
    ) -> None:
        await self._cluster.ledger.reserve(record)
        placement_seconds = self._cluster.clock.now_seconds() - decided_seconds
        metrics.ORDER_SECONDS.observe(placement_seconds)
        metrics.PLACEMENTS.labels(outcome="placed").inc()
        self._cluster.tell(
            "replica.placed",
            replica_id=record.replica_id,
            model=record.model,
            node_id=record.node_id,
            devices=list(record.devices),
            predicted_seconds=round(record.predicted_seconds, 4),
            load_seconds=round(start.estimate.load_seconds, 4),
            worker_seconds=round(start.estimate.worker_seconds, 4),
            tier=start.estimate.tier,
            options=len(start.options),
            placement_seconds=round(placement_seconds, 4),
        )
        node = self._cluster.view.nodes.get(record.node_id)
        try:
            if node is None:
                raise PeerError(f"node {record.node_id} left before the start could be ordered")
            await self._cluster.orders.start_replica(node.agent_address, record, model, placement_seconds)
        except Fenced:
            raise
        except StokerError as error:
            await self._start_refused(record, error)

    async def _start_refused(self, record: ReservationRecord, error: StokerError) -> None:
        """Give the slots back; the model rests only when the refusal was about it and not about the node."""
        metrics.PLACEMENTS.labels(outcome="refused_by_agent").inc()
        self._cluster.decisions.failed(record.replica_id, error.message)
        self._cluster.tell(
            "replica.order_failed",
            replica_id=record.replica_id,
            model=record.model,
            node_id=record.node_id,
            error_code=error.code,
            message=error.message,
        )
        if _is_about_the_node(error):
            self._cluster.apply(NodeDisconnected(node_id=record.node_id))
        else:
            failed = start_failed(
                self._cluster.view,
                record.model,
                code=error.code,
                message=error.message,
                now_seconds=self._cluster.clock.now_seconds(),
                policy=self._cluster.policy,
            )
            self._cluster.apply(failed)
        self._cluster.apply(Releasing(replica_id=record.replica_id))
        await self._release(record.replica_id, "its order failed")

    async def _stop(self, stop: Stop) -> None:
        node = self._cluster.view.nodes.get(stop.node_id)
        try:
            if node is None:
                raise PeerError(f"node {stop.node_id} left before the stop could be ordered")
            reservation = self._cluster.view.reservations.get(stop.replica_id)
            await self._cluster.orders.stop_replica(
                node.agent_address,
                stop.replica_id,
                only_if_idle=stop.only_if_idle,
                reason=stop.reason,
                to_replica_id=(reservation.moving_to or "") if reservation is not None else "",
            )
        except Fenced:
            raise
        except ReplicaBusy:
            self._cluster.apply(StopRefused(replica_id=stop.replica_id, busy=True))
        except StokerError as error:
            if _is_about_the_node(error):
                self._cluster.apply(
                    StopRefused(replica_id=stop.replica_id), NodeDisconnected(node_id=stop.node_id)
                )
            elif error.code != "not_found":  # what is not there is stopped
                log.get().error(
                    "replica.stop_failed",
                    replica_id=stop.replica_id,
                    node_id=stop.node_id,
                    error_code=error.code,
                    message=error.message,
                )
        else:
            self._cluster.tell(
                "replica.stopped", replica_id=stop.replica_id, node_id=stop.node_id, reason=stop.reason
            )

    async def _release(self, replica_id: ReplicaId, reason: str) -> None:
        await self._cluster.ledger.release(replica_id)
        self._cluster.apply(Released(replica_id=replica_id))
        self._cluster.decisions.failed(replica_id, reason)  # unless it has been ready
        self._cluster.tell("reservation.released", replica_id=replica_id, reason=reason)


def reservation_of(record: ReservationRecord, now_seconds: float, *, adopted: bool) -> Reservation:
    """Return a recorded reservation as this controller's view has it."""
    return Reservation(
        replica_id=record.replica_id,
        model=record.model,
        node_id=record.node_id,
        devices=record.devices,
        runtime=record.runtime,
        predicted_seconds=record.predicted_seconds,
        seen_seconds=now_seconds,
        adopted=adopted,
    )


def _is_about_the_node(error: StokerError) -> bool:
    """Tell whether a call failed because of the node, not because of what it was asked.

    It is not there, it is about to stop, or its slots are taken by what it has not reported yet: nothing is
    placed there until its next report.
    """
    return isinstance(error, DeadlineExceeded) or error.code in {PeerError.code, CapacityError.code}
