"""The controller's own decisions in the simulated cluster: `reconcile`, `place` and `fold` as they are.

This is a controller's shell without I/O: what happens in the world becomes events for the view, and what
`reconcile` decides becomes commands to the world. Reservations succeed at once, orders arrive at once, and
agents report every change at once; nothing here decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice

from services.controller.cluster_view.events import (
    Demanded,
    DemandEnded,
    Event,
    LoadReported,
    ModelPut,
    MoveOrdered,
    NodeReported,
    NodeUnreachable,
    Released,
    Releasing,
    Reserved,
    StopOrdered,
    StopRefused,
)
from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.foreseen import Foreseen, fold_foreseen
from services.controller.cluster_view.frozen import maker_of
from services.controller.cluster_view.view import (
    Checkpoint,
    Held,
    Node,
    Policy,
    Pool,
    Reservation,
    Stage,
    View,
)
from services.controller.scaling.actions import Action, Migrate, Note, Release, Start, Stop
from services.controller.scaling.foresight import Limits
from services.controller.scaling.rebalancing import RebalanceLimits
from services.controller.scaling.reconcile import reconcile
from services.controller.simulation.levelling import Levelling
from services.controller.simulation.looking_ahead import LookingAhead
from services.controller.simulation.parts import Phase as Standing
from services.controller.simulation.parts import Session, SimNode, SimReplica, Tiers
from services.controller.simulation.reports import (
    devices_of,
    held_on,
    held_since,
    model_of,
    replica_of,
    session_load,
)
from services.controller.simulation.world import World
from stoker.ids import ModelName, NodeId, ReplicaId

_make_node, _make_stage, _make_load_reported = maker_of(Node), maker_of(Stage), maker_of(LoadReported)
_make_demanded = maker_of(Demanded)
_NEVER_SECONDS = 1e12
_NONE: Mapping[SimReplica, None] = {}
_Standing = tuple[int, tuple[tuple[SimReplica, Standing], ...]]
"""How often what a host holds has changed, and its replicas with where they stand."""
MAX_PASSES = 50
"""Decisions must settle: a rule that undoes another one would go on for ever."""


class Ours:
    """The controller.

    Args:
        name: For the table.
        policy: The constants of its decisions.
        preempts: Where it would move a replica, end it instead, and begin its sessions again: the paper's
            "Shepherd*", which has our estimates and our choice of node, but no migration.
        limits: What forecasts may do; None = there are none.
        levels: What rebalancing may do; None = there is none.
    """

    keeps_tokens = True

    def __init__(
        self,
        name: str,
        policy: Policy,
        *,
        preempts: bool = False,
        limits: Limits | None = None,
        levels: RebalanceLimits | None = None,
    ) -> None:
        self.name = name
        self.tiers = Tiers()
        self._policy = replace(
            policy, node_timeout_seconds=_NEVER_SECONDS, node_forget_seconds=_NEVER_SECONDS
        )
        self._preempts = preempts
        self._ahead = LookingAhead(limits) if limits is not None else None
        self._levelling = Levelling(levels) if levels is not None else None
        self._view = View()
        self._foreseen: tuple[Foreseen, ...] = ()
        """What the plan that is carried out has folded already."""
        self._waiters: Counter[ModelName] = Counter()
        self._queues: dict[ModelName, tuple[int, float, tuple[SimReplica, ...]]] = {}
        """Of models that wait at ready replicas: how many, since when the longest, and at which."""
        self._held_by_node: dict[NodeId, tuple[int, dict[Checkpoint, Held]]] = {}
        self._told: dict[NodeId, _Standing] = {}
        """Of nodes that are up, what they reported whole last."""
        self._replicas: dict[ReplicaId, SimReplica] = {}
        self._reserved: dict[SimReplica, ReplicaId] = {}
        self._targets: dict[SimReplica, SimReplica] = {}
        """Of moves that have not begun: where a replica's sessions will go."""

    def decide(self, world: World) -> float | None:
        """See `Decider`."""
        if not self._view.models:
            for spec in world.models.values():
                self._fold(ModelPut(model=model_of(spec, world)))
        due_seconds = self._settle(world)
        if self._levelling is not None:
            for move in self._levelling.look(self._view, self._policy, self._replicas, world):
                self._migrate(move, world)
            levelling_seconds = self._levelling.due_seconds()
            due_seconds = levelling_seconds if due_seconds is None else min(due_seconds, levelling_seconds)
        if self._ahead is None:
            return due_seconds
        ahead_seconds = self._ahead.look(self._view, world)
        return ahead_seconds if due_seconds is None else min(due_seconds, ahead_seconds)

    def _settle(self, world: World) -> float | None:
        """Decide until nothing more is to be done; return when to look again though nothing happens."""
        for _ in range(MAX_PASSES):
            self._tell_nodes(world)
            self._tell_waiters(world)
            world.changes.queues.clear()
            plan = reconcile(self._view, world.now, self._policy)
            self._foreseen = plan.foreseen
            for action in plan.actions:
                self._act(action, world)
            self._foreseen = ()
            if not plan.actions:
                due_seconds = plan.next_due_seconds
                return None if due_seconds is None or due_seconds >= _NEVER_SECONDS else due_seconds
        raise AssertionError(f"decisions do not settle at {world.now}: {plan.actions[:3]}")

    def _fold(self, event: Event) -> None:
        foreseen = self._foreseen
        self._view = fold_foreseen(self._view, event, foreseen) if foreseen else fold(self._view, event)

    # --- what happens ---

    def _tell_waiters(self, world: World) -> None:
        """Requests wait with the controller while no replica is ready, else in the replicas' queues."""
        for name in world.changes.queues:
            waiting = len(world.queues[name])
            if waiting and _ready(world, name):
                waiting = 0
            known = self._waiters.get(name, 0)
            if waiting == known:
                continue
            for session in islice(world.queues[name], known, waiting):
                self._fold(_demanded(session, world.now))
            for _ in range(known - waiting):
                self._fold(DemandEnded(model=name))
            if waiting:
                self._waiters[name] = waiting
            else:
                self._waiters.pop(name, None)

    def _tell_nodes(self, world: World) -> None:
        """Report nodes; of those where nothing but sessions began or ended, no more than these."""
        changes = world.changes
        loads: dict[NodeId, dict[SimReplica, None]] = {}
        for replica in changes.replicas:
            loads.setdefault(replica.node.node_id, {})[replica] = None
        if changes.queues:
            for replica in self._queue_elsewhere(world):
                loads.setdefault(replica.node.node_id, {})[replica] = None
        if not loads and not changes.nodes and not changes.gone:
            return
        for node_id in {**changes.nodes, **loads} if changes.nodes else loads:
            self._tell_node(world.nodes[node_id], loads.get(node_id, _NONE), world)
        for replica in changes.gone:
            replica_id = self._reserved.pop(replica, None)
            if replica_id is not None:
                del self._replicas[replica_id]
            self._targets.pop(replica, None)
        changes.nodes.clear()
        changes.replicas.clear()
        changes.gone.clear()

    def _tell_node(self, node: SimNode, load: Mapping[SimReplica, None], world: World) -> None:
        node_id = node.node_id
        if node.down:
            self._told.pop(node_id, None)
            self._fold(NodeUnreachable(node_id=node_id))
        elif node_id not in world.changes.nodes and self._is_still(node):
            self._fold(self._load(node, load, world))
        elif self._told.get(node_id) == (standing := self._standing(node)):
            self._fold(self._load(node, load, world, _queued_bytes(node, world)))
        else:
            self._told[node_id] = standing
            self._fold(NodeReported(node=self._node(node, world)))

    def _queue_elsewhere(self, world: World) -> list[SimReplica]:
        """Return the replicas of models whose ready ones have other queues than was told."""
        others: list[SimReplica] = []
        for name in sorted(world.changes.queues):
            if not world.queues[name] and name not in self._queues:
                continue
            ready = [each for each in world.replicas[name] if each.phase is Standing.READY]
            longest_since_seconds = world.serving.longest_since_seconds(name) if ready else None
            queue = None
            if longest_since_seconds is not None:
                queue = (len(world.queues[name]), longest_since_seconds, tuple(ready))
            if queue == self._queues.get(name):
                continue
            others += world.replicas[name]
            if queue is None:
                del self._queues[name]
            else:
                self._queues[name] = queue
        return others

    def _is_still(self, node: SimNode) -> bool:
        """Tell whether a node's last report holds but for sessions: nothing is moving, nothing moved."""
        known = self._held_by_node.get(node.node_id)
        is_still = not node.disk.transfers and not node.network.transfers
        return is_still and known is not None and known[0] == node.holdings

    def _standing(self, node: SimNode) -> _Standing:
        """Return what a whole report says beside sessions, and bytes that wait before the node's stages."""
        reserved = [each for each in node.replicas if each in self._reserved]
        return node.holdings, tuple([(each, each.phase) for each in reserved])

    def _load(
        self,
        node: SimNode,
        changed: Mapping[SimReplica, None],
        world: World,
        queued_bytes: dict[str, int] | None = None,
    ) -> LoadReported:
        """Return the sessions of these replicas of a node, and of those that serve: their contexts grow."""
        reserved = self._reserved
        told = [
            each
            for each in dict.fromkeys(node.owners)
            if each is not None and (each.sessions or each in changed) and each in reserved
        ]
        return _make_load_reported(
            node_id=node.node_id,
            replicas=tuple([session_load(reserved[each], each, world) for each in told]),
            seen_seconds=world.clock.now_seconds,
            queued_bytes=queued_bytes,
        )

    def _node(self, node: SimNode, world: World) -> Node:
        replicas = [each for each in node.replicas if each in self._reserved]
        device, queued_bytes = node.spec.device, _queued_bytes(node, world)
        return _make_node(
            node_id=node.node_id,
            devices=devices_of(device.kind, device.memory_bytes, node.spec.device_count),
            replicas={
                self._reserved[each]: replica_of(self._reserved[each], each, world) for each in replicas
            },
            held=self._held(node),
            stages={
                "disk": _make_stage(
                    bytes_per_second=node.disk.bytes_per_second,
                    queued_bytes=queued_bytes["disk"],
                ),
                "remote": _make_stage(
                    bytes_per_second=node.network.bytes_per_second,
                    queued_bytes=queued_bytes["remote"],
                ),
                "device": _make_stage(bytes_per_second=device.bus_bytes_per_second),
            },
            pool=Pool(
                total_bytes=node.spec.dram_bytes,
                free_bytes=node.spec.dram_bytes - sum(node.dram.values()),
            ),
            warm_workers=node.spec.device_count,
            worker_start_seconds=node.spec.worker_start_seconds,
            last_seen_seconds=world.now,
        )

    def _held(self, node: SimNode) -> dict[Checkpoint, Held]:
        """Return what a host holds: the same object as long as that is the same."""
        known = self._held_by_node.get(node.node_id)
        if known is None or known[0] != node.holdings:
            held = held_on(node) if known is None else held_since(node, known[1])
            known = self._held_by_node[node.node_id] = (node.holdings, held)
            node.moved.clear()
        return known[1]

    # --- what is decided ---

    def _act(self, action: Action, world: World) -> None:
        match action:
            case Note(event=event):
                self._fold(event)
            case Start():
                self._start(action, world)
            case Migrate():
                self._migrate(action, world)
            case Stop():
                self._stop(action, world)
            case Release(replica_id=replica_id):
                self._fold(Releasing(replica_id=replica_id))
                self._fold(Released(replica_id=replica_id))

    def _start(self, start: Start, world: World) -> SimReplica:
        model, node = world.models[start.model], world.nodes[start.node_id]
        replica = world.start(model, node, start.devices)
        replica.predicted_seconds = start.estimate.total_seconds
        self._replicas[replica.replica_id] = replica
        self._reserved[replica] = replica.replica_id
        reservation = Reservation(
            replica_id=replica.replica_id,
            model=start.model,
            node_id=start.node_id,
            devices=start.devices,
            runtime=start.runtime,
            predicted_seconds=start.estimate.total_seconds,
            seen_seconds=world.now,
        )
        self._fold(Reserved(reservation=reservation))
        return replica

    def _migrate(self, move: Migrate, world: World) -> None:
        source = self._replicas[move.replica_id]
        if self._preempts:
            ordered = StopOrdered(replica_id=move.replica_id, now_seconds=world.now, for_model=move.for_model)
            self._fold(ordered)
            world.preempt(source)
            return
        target = self._start(move.start, world)
        target.awaits_move = True
        self._targets[source] = target
        ordered_move = MoveOrdered(replica_id=move.replica_id, to=target.replica_id, for_model=move.for_model)
        self._fold(ordered_move)

    def _stop(self, stop: Stop, world: World) -> None:
        ordered = StopOrdered(replica_id=stop.replica_id, now_seconds=world.now, for_model=stop.for_model)
        self._fold(ordered)
        replica = self._replicas[stop.replica_id]
        target = self._targets.pop(replica, None)
        if replica.phase is Standing.GONE:
            return
        if target is not None and target.phase is Standing.READY and not stop.only_if_idle:
            world.migrate_to(replica, target)
        elif not replica.sessions:
            world.stop(replica)
        elif stop.only_if_idle:
            self._fold(StopRefused(replica_id=stop.replica_id, busy=True))
        elif self._preempts:
            world.preempt(replica)
        else:
            world.displace(replica)


def _queued_bytes(node: SimNode, world: World) -> dict[str, int]:
    """Return what waits before the stages that a node's loads share."""
    return {
        "disk": round(world.flows.left_bytes(node.disk)),
        "remote": round(world.flows.left_bytes(node.network)),
    }


def _demanded(session: Session, now_seconds: float) -> Demanded:
    """Return what a session's gateway says when it asks for a replica."""
    return _make_demanded(
        model=session.request.model,
        now_seconds=now_seconds,
        waited_seconds=now_seconds - session.began_to_wait_seconds,
        earlier_waits_seconds=session.wait_seconds,
    )


def _ready(world: World, name: ModelName) -> bool:
    return any(replica.phase is Standing.READY for replica in world.replicas[name])
