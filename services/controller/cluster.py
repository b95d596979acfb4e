"""The leader's actor: folds events into the view, asks `reconcile` what to do, and does it.

Everything here runs in one event loop, so the view needs no lock: it is replaced between awaits. The loop
wakes on events and on the plan's next due time, never by polling. Orders and state writes run as tasks beside
it (`effects`); what they reserve is in the view before they begin. An error of the state, or a fence, ends
the term: the view is thrown away and built anew from state and reports (`leadership`); a restart works the
same way.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

from services.controller import metrics
from services.controller.answer import answer
from services.controller.cluster_view.events import (
    Declined,
    Demanded,
    DemandEnded,
    Distrusted,
    Event,
    ModelDeleted,
    ModelPut,
    NodeDisconnected,
    NodeReported,
    Reserved,
    SchedulingSet,
)
from services.controller.cluster_view.foreseen import Foreseen, fold_foreseen
from services.controller.cluster_view.reach import touched
from services.controller.cluster_view.view import Scheduling, View
from services.controller.decision_log import DecisionLog
from services.controller.effects import Effects, reservation_of
from services.controller.event_log import EventLog
from services.controller.ledger import Ledger
from services.controller.orders import Orders
from services.controller.placement.deadline import Late, late_if_started
from services.controller.records import ModelRecord
from services.controller.routes import Routes
from services.controller.scaling.actions import Migrate, Start
from services.controller.scaling.reconcile import reconcile
from services.controller.scaling.settling import Settling, disturbs
from services.controller.settings import ControllerSettings
from services.controller.wire import model_of, node_of
from stoker import log
from stoker.background import background
from stoker.clock import Clock
from stoker.errors import (
    NotLeader,
    QueueFull,
)
from stoker.ids import ModelName, NodeId, ReplicaId
from stoker.v1 import node_agent_pb2


class Cluster:
    """The cluster as its leader knows and changes it, for one term."""

    def __init__(self, ledger: Ledger, orders: Orders, settings: ControllerSettings, clock: Clock) -> None:
        self.view = View()
        self.records: dict[ModelName, ModelRecord] = {}
        self.reports: dict[NodeId, node_agent_pb2.NodeReport] = {}
        self.routes = Routes(settings.routes_heartbeat_seconds)
        self.ledger = ledger
        self.orders = orders
        self.clock = clock
        self._settings = settings
        self.policy = settings.policy()
        self.decisions = DecisionLog()
        self.events = EventLog()
        self._requests: dict[ModelName, set[str]] = defaultdict(set)
        self._dirty = asyncio.Event()
        self._waiters: dict[ModelName, set[asyncio.Event]] = defaultdict(set)
        self._waiting = 0
        self._ended = False
        self._foreseen: tuple[Foreseen, ...] = ()
        """What the last plan has folded already."""
        self._ordered: deque[Migrate | Start] = (
            deque()
        )  # bounded: by calls of operators, and a clearing's moves

    # --- one term ---

    async def load(self) -> None:
        """Build the view from the state; call once, before `run`.

        Raises:
            StokerError: The state cannot be read.
        """
        recorded = await self.ledger.read()
        for model in recorded.models:
            self.put_record(model)
        now_seconds = self.clock.now_seconds()
        for record in recorded.reservations:
            self.apply(Reserved(reservation=reservation_of(record, now_seconds, adopted=True)))
        for node_id, scheduling in recorded.scheduling.items():
            self.apply(SchedulingSet(node_id=node_id, scheduling=scheduling))

    async def run(self) -> None:
        """Decide and act until cancelled.

        Raises:
            Fenced: This controller no longer leads.
            StokerError: The state failed or disagrees: load anew.
        """
        loop, effects = asyncio.get_running_loop(), Effects(self)
        settling = Settling(
            began_seconds=self.clock.now_seconds(),
            settling_seconds=self._settings.settling_seconds,
            node_timeout_seconds=self._settings.node_timeout_seconds,
        )
        async with background() as tasks:
            while True:
                self._dirty.clear()
                while self._ordered:
                    effects.begin(self._ordered.popleft(), tasks)
                now_seconds = self.clock.now_seconds()
                settled_seconds = settling.until_seconds(self.view, now_seconds)
                plan = reconcile(self.view, now_seconds, self.policy)
                self._foreseen = plan.foreseen
                for name, decision in plan.decisions:
                    waiting = self._requests.get(name, set())
                    self.decisions.add(name, decision, waiting, self.clock.unix_seconds())
                dues = [] if plan.next_due_seconds is None else [plan.next_due_seconds]
                for action in plan.actions:
                    if settled_seconds > now_seconds and disturbs(action):
                        dues.append(settled_seconds)
                    else:
                        effects.begin(action, tasks)
                timer = None
                if dues:
                    timer = loop.call_later(min(dues) - now_seconds, self._dirty.set)
                await self._dirty.wait()
                if timer is not None:
                    timer.cancel()

    def end(self) -> None:
        """Wake everybody who waits; they learn that this term is over."""
        self._ended = True
        self.events.end()
        for events in self._waiters.values():
            for event in events:
                event.set()

    def check_leading(self) -> None:
        """Raise NotLeader when this term is over."""
        if self._ended:
            raise NotLeader(
                "this controller stopped leading while it answered: ask again", retry_after_seconds=1.0
            )

    # --- what happens ---

    def apply(self, *events: Event) -> None:
        """Fold events, tell who watches, and have the loop decide anew."""
        now_seconds = self.clock.now_seconds()
        names: set[ModelName] = set()
        for event in events:
            names |= touched(self.view, event)
            self.view = fold_foreseen(self.view, event, self._foreseen)
        self.routes.refresh(self.view, self.records, names, now_seconds)
        for name in names & self._waiters.keys():
            for waiter in self._waiters[name]:
                waiter.set()
        self._dirty.set()

    def put_record(self, record: ModelRecord) -> None:
        """Take over a model record that was read or committed."""
        model = model_of(record)
        self.records[model.name] = record
        self.apply(ModelPut(model=model))

    def drop_record(self, name: ModelName) -> None:
        """Take over the deletion of a model record."""
        self.records.pop(name, None)
        self.apply(ModelDeleted(name=name))

    def report(self, report: node_agent_pb2.NodeReport) -> None:
        """Take over an agent's report."""
        node_id = NodeId(report.node_id)
        before = self.view.nodes.get(node_id)
        if before is None or node_id not in self.reports:
            self.tell("node.joined", node_id=node_id, agent_address=report.agent_address)
        self.reports[node_id] = report
        self.apply(NodeReported(node=node_of(report, self.clock.now_seconds())))
        was_ready = {
            replica_id
            for replica_id, replica in (before.replicas if before else {}).items()
            if replica.ready_since_seconds is not None
        }
        for replica in report.replicas:
            is_ready = replica.state == node_agent_pb2.REPLICA_STATE_READY and not replica.loading
            if is_ready and replica.replica_id not in was_ready:
                self._log_ready(replica, node_id)
            elif replica.state == node_agent_pb2.REPLICA_STATE_FAILED:
                self.decisions.failed(ReplicaId(replica.replica_id), replica.error_message)

    def disconnected(self, node_id: NodeId) -> None:
        """An agent's report stream ended."""
        if node_id in self.view.nodes:
            self.tell("node.disconnected", node_id=node_id)
            self.apply(NodeDisconnected(node_id=node_id))

    async def set_scheduling(self, node_id: NodeId, scheduling: Scheduling) -> None:
        """Open, cordon or drain a node, for this term and later ones.

        Raises:
            StateUnavailable: No answer; it may have been written or not.
            Fenced: This controller no longer leads.
        """
        await self.ledger.set_scheduling(node_id, scheduling)
        self.apply(SchedulingSet(node_id=node_id, scheduling=scheduling))
        self.tell("node.scheduling_set", node_id=node_id, scheduling=scheduling.value)

    def order(self, action: Migrate | Start) -> None:
        """Have the loop begin a move that an operator or rebalancing wants, or the start before it."""
        self._ordered.append(action)
        self._dirty.set()

    @contextmanager
    def watching(self, name: ModelName) -> Iterator[asyncio.Event]:
        """Yield an event that is set whenever something about a model has changed; counts as no demand."""
        woken = asyncio.Event()
        self._waiters[name].add(woken)
        try:
            yield woken
        finally:
            self._waiters[name].discard(woken)
            if not self._waiters[name]:
                del self._waiters[name]

    def tell(self, kind: str, **fields: object) -> None:
        """Log an event, and keep it for operators."""
        log.get().info(kind, **fields)
        self.events.add(kind, self.clock.unix_seconds(), **fields)

    @contextmanager
    def waiting(
        self,
        name: ModelName,
        failed: frozenset[ReplicaId],
        request_id: str = "",
        waited_seconds: float = 0.0,
        earlier_waits_seconds: float = 0.0,
    ) -> Iterator[asyncio.Event]:
        """Count a request that waits for `name`; yields an event that is set whenever to look again.

        Args:
            name: The model.
            failed: Replicas that just failed under the request.
            request_id: The request's.
            waited_seconds: How long it has waited before it came here.
            earlier_waits_seconds: Of these, before it was served last.

        Raises:
            QueueFull: Too many wait already.
        """
        if self._waiting >= self._settings.max_waiters:
            raise QueueFull(
                f"{self._waiting} requests wait for replicas already, the controller's limit",
                retry_after_seconds=5.0,
            )
        woken = asyncio.Event()
        self._waiting += 1
        metrics.WAITERS.set(self._waiting)
        self._waiters[name].add(woken)
        if request_id:
            self._requests[name].add(request_id)
        known = frozenset(found for found in failed if found in self.view.reservations)
        now_seconds = self.clock.now_seconds()
        demanded = Demanded(
            model=name,
            now_seconds=now_seconds,
            waited_seconds=waited_seconds,
            earlier_waits_seconds=earlier_waits_seconds,
        )
        self.apply(*([Distrusted(replica_ids=known)] if known else []), demanded)
        try:
            yield woken
        finally:
            self._waiting -= 1
            metrics.WAITERS.set(self._waiting)
            self._waiters[name].discard(woken)
            if request_id:
                self._requests[name].discard(request_id)
                if not self._requests[name]:
                    del self._requests[name]
            if not self._waiters[name]:
                del self._waiters[name]
            self.apply(DemandEnded(model=name))

    def decline_if_late(self, name: ModelName, due_seconds: float) -> Late | None:
        """Tell whether a request due then is to be refused before anything is ordered for it."""
        now_seconds = self.clock.now_seconds()
        found = answer(self.view, name, since_seconds=now_seconds, now_seconds=now_seconds)
        hopeless = late_if_started(
            self.view,
            name,
            found,
            now_seconds=now_seconds,
            due_seconds=due_seconds,
            policy=self.policy,
        )
        if hopeless is not None:
            self.apply(Declined(model=name, now_seconds=now_seconds))
            self.tell(
                "request.declined",
                model=name,
                estimate_seconds=round(hopeless.ready_seconds, 4),
                due_in_seconds=round(due_seconds - now_seconds, 4),
            )
        return hopeless

    def _log_ready(self, replica: node_agent_pb2.Replica, node_id: NodeId) -> None:
        reservation = self.view.reservations.get(ReplicaId(replica.replica_id))
        if reservation is None or reservation.adopted:
            return
        timings = replica.timings
        metrics.observe_start(timings, reservation.predicted_seconds)
        self.decisions.ready(reservation.replica_id, timings)
        self.tell(
            "replica.ready",
            replica_id=replica.replica_id,
            model=replica.model,
            node_id=node_id,
            predicted_seconds=round(reservation.predicted_seconds, 4),
            measured_seconds=round(self.clock.now_seconds() - reservation.seen_seconds, 4),
            **{
                f"{stage}_seconds": round(getattr(timings, f"{stage}_seconds"), 4) for stage in metrics.STAGES
            },
            transfers={transfer.tier: transfer.bytes for transfer in timings.transfers},
        )
