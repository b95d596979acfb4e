"""A world the controller's pure modules decide about: time, nodes and replicas change only when told to.

Decisions are carried out as a perfect shell and perfect agents would: a start is reserved and reported as
starting at once, a stop is only written down until the scenario says that the replica has stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from services.controller.answer import Answer, answer
from services.controller.cluster_view.estimate import Estimate
from services.controller.cluster_view.events import (
    Event,
    MoveOrdered,
    NodeReported,
    Released,
    Releasing,
    Reserved,
    StopOrdered,
)
from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.view import Held, Model, Node, Phase, Policy, Replica, Reservation, View
from services.controller.scaling.actions import Action, Migrate, Note, Release, Start, Stop
from services.controller.scaling.clearing import migrations
from services.controller.scaling.foresight import Foreseen, Limits, Prefetch, foresee, has_ended
from services.controller.scaling.rebalancing import Rebalanced, RebalanceLimits, rebalance
from services.controller.scaling.reconcile import reconcile
from stoker.ids import ModelName, NodeId, ReplicaId

MAX_PASSES = 100
"""Decisions must settle: a rule that undoes another one would go on for ever."""
HEARTBEAT_SECONDS = 4.0


@dataclass
class World:
    """What is true, what the controller knows, and what it decided."""

    policy: Policy = field(default_factory=Policy)
    now_seconds: float = 1000.0
    view: View = field(default_factory=View)
    nodes: dict[NodeId, Node] = field(default_factory=dict)
    silent: set[NodeId] = field(default_factory=set)
    decisions: list[str] = field(default_factory=list)
    foreseen: Foreseen = field(default_factory=Foreseen)
    prefetching: dict[NodeId, Prefetch] = field(default_factory=dict)
    rebalanced: Rebalanced = field(default_factory=Rebalanced)
    _started: dict[ModelName, int] = field(default_factory=dict)

    def apply(self, *events: Event) -> None:
        """Let things happen, then decide until nothing is left to decide."""
        for event in events:
            self.view = fold(self.view, event)
        self.decide()

    def decide(self) -> float | None:
        """Carry out plans until one is empty; returns when to decide again."""
        for _ in range(MAX_PASSES):
            plan = reconcile(self.view, self.now_seconds, self.policy)
            for action in plan.actions:
                self._carry_out(action)
            if not plan.actions:
                return plan.next_due_seconds
        raise AssertionError(f"decisions do not settle: {self.decisions[-10:]}")

    def wait(self, seconds: float) -> None:
        """Let time pass: nodes that are not silent report, and the controller wakes when it wanted to."""
        end_seconds = self.now_seconds + seconds
        while self.now_seconds < end_seconds:
            due_seconds = self.decide()
            step_seconds = min(end_seconds, self.now_seconds + HEARTBEAT_SECONDS)
            if due_seconds is not None:
                step_seconds = min(step_seconds, due_seconds)
            self.now_seconds = step_seconds
            for node_id in sorted(self.nodes.keys() - self.silent):
                self.report(node_id)
        self.decide()

    def report(self, node_id: NodeId) -> None:
        """A node reports what is true on it."""
        node = replace(self.nodes[node_id], last_seen_seconds=self.now_seconds)
        self.apply(NodeReported(node=node))

    def change_node(self, node_id: NodeId, **changes: object) -> None:
        """Change what is true of a node, and have it report."""
        self.nodes[node_id] = replace(self.nodes[node_id], **changes)  # type: ignore[arg-type]
        self.report(node_id)

    def change_replica(self, replica_id: ReplicaId, **changes: object) -> None:
        """Change what is true of a replica, and have its node report."""
        node = self.node_of(replica_id)
        replica = replace(node.replicas[replica_id], **changes)  # type: ignore[arg-type]
        self.change_node(node.node_id, replicas={**node.replicas, replica_id: replica})

    def remove_replica(self, replica_id: ReplicaId) -> None:
        """A replica has ended, and its node reports."""
        node = self.node_of(replica_id)
        left = {key: value for key, value in node.replicas.items() if key != replica_id}
        self.change_node(node.node_id, replicas=left)

    def foresee(self, limits: Limits) -> None:
        """Look ahead once, and write down what is to be prepared: prefetches, and new numbers of workers."""
        before = self.foreseen.pools
        self.foreseen = foresee(self.view, self.foreseen, self.now_seconds, limits)
        for found in self.foreseen.prefetches:
            self.prefetching[found.node_id] = found
            dropping = f" dropping {','.join(found.drop)}" if found.drop else ""
            self.decisions.append(f"prefetch {found.model} on {found.node_id}{dropping}")
        for node_id, pool in sorted(self.foreseen.pools.items()):
            if node_id not in before or before[node_id].count != pool.count:
                self.decisions.append(f"workers {node_id} {pool.count}")

    def prefetched(self, name: ModelName, node_id: NodeId, *, failed: bool = False) -> None:
        """A prefetch has ended: the node holds the checkpoint, what was named is gone; or it failed."""
        ended = self.prefetching.pop(node_id)
        assert ended.model == name
        self.foreseen = has_ended(self.foreseen, node_id, self.now_seconds, failed=failed)
        if failed:
            return
        node, wanted = self.nodes[node_id], self.view.models[name]
        gone = {self.view.models[dropped].checkpoint for dropped in ended.drop}
        held = {checkpoint: found for checkpoint, found in node.held.items() if checkpoint not in gone}
        disk_bytes = held.get(wanted.checkpoint, Held()).disk_bytes
        held[wanted.checkpoint] = Held(dram_bytes=wanted.file_bytes, disk_bytes=disk_bytes)
        free_bytes = node.pool.total_bytes - sum(found.dram_bytes for found in held.values())
        self.change_node(node_id, held=held, pool=replace(node.pool, free_bytes=free_bytes))

    def rebalance(self, limits: RebalanceLimits) -> None:
        """Look once at what running streams should move, and begin the moves of replicas."""
        self.rebalanced = rebalance(self.view, self.rebalanced, self.now_seconds, self.policy, limits)
        for shift in self.rebalanced.shifts:
            self.decisions.append(f"shift {shift.sessions} of {shift.replica_id} to {shift.to_replica_id}")
        clearing = self.rebalanced.clearing
        if clearing is not None:
            self.decisions.append(f"clear {clearing.node_id} for {clearing.model}")
            for move in migrations(self.view, clearing):
                self._move(move)
            self.decide()

    def node_of(self, replica_id: ReplicaId) -> Node:
        """Return the node a replica runs on; fails when it runs nowhere."""
        return next(node for node in self.nodes.values() if replica_id in node.replicas)

    def restart_controller(self) -> None:
        """A new controller knows the models and reservations, and no node yet."""
        before = self.view
        self.view = View(models=before.models, always=before.always)
        self.apply(
            *(
                Reserved(
                    reservation=Reservation(
                        replica_id=kept.replica_id,
                        model=kept.model,
                        node_id=kept.node_id,
                        devices=kept.devices,
                        runtime=kept.runtime,
                        predicted_seconds=kept.predicted_seconds,
                        seen_seconds=self.now_seconds,
                        adopted=True,
                    )
                )
                for kept in before.reservations.values()
            )
        )

    def answer(self, name: ModelName) -> Answer:
        """Return what a request that begins to wait now is told."""
        return answer(self.view, name, since_seconds=self.now_seconds, now_seconds=self.now_seconds)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Note(event=event):
                self.view = fold(self.view, event)
                self._write_down(event)
            case Start():
                self._start(action)
            case Stop(replica_id=replica_id, reason=reason, for_model=for_model):
                self.decisions.append(f"stop {replica_id}: {reason}")
                ordered = StopOrdered(
                    replica_id=replica_id,
                    now_seconds=self.now_seconds,
                    for_model=for_model,
                    node_id=action.node_id,
                )
                self.view = fold(self.view, ordered)
            case Migrate():
                self._move(action)
            case Release(replica_id=replica_id, reason=reason):
                self.decisions.append(f"release {replica_id}: {reason}")
                self.view = fold(self.view, Releasing(replica_id=replica_id))
                self.view = fold(self.view, Released(replica_id=replica_id))

    def _write_down(self, event: Event) -> None:
        match type(event).__name__, event:
            case "NodeUnreachable", _:
                self.decisions.append(f"unreachable {event.node_id}")  # type: ignore[union-attr]
            case "NodeForgotten", _:
                self.decisions.append(f"forget {event.node_id}")  # type: ignore[union-attr]
            case "StartFailed", _:
                rest_seconds = event.retry_at_seconds - self.now_seconds  # type: ignore[union-attr]
                self.decisions.append(f"rest {event.model} {rest_seconds:g}s")  # type: ignore[union-attr]
            case _:
                pass

    def _start(self, start: Start) -> None:
        replica_id = self._named(start.model)
        slots = ",".join(map(str, start.devices))
        self.decisions.append(f"start {replica_id} on {start.node_id}/{slots}")
        self._begin(replica_id, start.model, start.node_id, start.devices, start.runtime, start.estimate)

    def _move(self, move: Migrate) -> None:
        to = self._named(move.model)
        slots = ",".join(map(str, move.to_devices))
        self.decisions.append(
            f"move {move.replica_id} to {to} on {move.to_node_id}/{slots} for {move.for_model}"
        )
        self._begin(to, move.model, move.to_node_id, move.to_devices, move.runtime, move.estimate)
        ordered = MoveOrdered(replica_id=move.replica_id, to=to, for_model=move.for_model)
        self.view = fold(self.view, ordered)

    def _named(self, model: ModelName) -> ReplicaId:
        self._started[model] = self._started.get(model, 0) + 1
        return ReplicaId(f"{model}.{self._started[model]}")

    def _begin(  # noqa: PLR0913, PLR0917 - a start's facts
        self,
        replica_id: ReplicaId,
        model: ModelName,
        node_id: NodeId,
        devices: tuple[int, ...],
        runtime: str,
        estimate: Estimate,
    ) -> None:
        reservation = Reservation(
            replica_id=replica_id,
            model=model,
            node_id=node_id,
            devices=devices,
            runtime=runtime,
            predicted_seconds=estimate.total_seconds,
            seen_seconds=self.now_seconds,
        )
        self.view = fold(self.view, Reserved(reservation=reservation))
        node = self.nodes[node_id]
        replica = Replica(replica_id=replica_id, model=model, phase=Phase.STARTING, devices=devices)
        self.nodes[node_id] = replace(node, replicas={**node.replicas, replica_id: replica})


def model(name: str, **changes: object) -> Model:
    """Return a model of 1 GB with sensible numbers, changed as told."""
    plain = Model(
        name=ModelName(name),
        checkpoint_uri=f"/models/{name}",  # type: ignore[arg-type]
        revision="r1",  # type: ignore[arg-type]
        architecture="LlamaForCausalLM",
        file_bytes=1_000_000_000,
        weight_bytes=1_000_000_000,
        runtime="v1",
        layers=10,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]
