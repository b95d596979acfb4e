"""The simulated cluster's truth: hosts, replicas and caches, changed by commands and by time.

A policy looks at this world and commands it (`start`, `stop`, `preempt`, `migrate`); the world carries it out
with the hardware's delays, and remembers what became of each request (`serving`). It decides nothing.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from services.controller.simulation.clock import VirtualClock
from services.controller.simulation.flows import Flows, Link
from services.controller.simulation.hardware import ModelSpec, NodeSpec
from services.controller.simulation.loads import Loads
from services.controller.simulation.parts import (
    Changes,
    Counters,
    Phase,
    Session,
    SimNode,
    SimReplica,
    Tiers,
    fill,
    insert,
    node_of,
)
from services.controller.simulation.serving import Serving
from services.controller.simulation.workload import Request
from stoker.ids import ModelName, NodeId, ReplicaId

SWITCH_SECONDS = 0.05
"""A session's pause at the end of a move: the last round and the hand-over."""

SHARED = "shared"
"""Counted as the tier of bytes that were on their way into the host for another replica anyway."""

AHEAD = "ahead"
"""Counted as the tier of bytes that were fetched into memory before anybody asked for them."""


class Decider(Protocol):
    """A policy."""

    name: str
    tiers: Tiers
    keeps_tokens: bool
    """Sessions of a host that fails go on after their last token; otherwise they begin again."""

    def decide(self, world: World) -> float | None:
        """Command the world; return when to be asked again though nothing happens, None = then only."""


class World:
    """A cluster on a virtual clock.

    Args:
        specs: Hosts.
        models: What is served.
        policy: Who decides.
        timeout_seconds: A request that waits longer is lost.
    """

    def __init__(
        self,
        specs: Sequence[NodeSpec],
        models: Sequence[ModelSpec],
        policy: Decider,
        *,
        timeout_seconds: float = 300.0,
    ) -> None:
        self.clock = VirtualClock()
        self.flows = Flows(self.clock.now, self.clock.at)
        self.loads = Loads(self.flows)
        self.models: Mapping[ModelName, ModelSpec] = {model.name: model for model in models}
        self.nodes: dict[NodeId, SimNode] = {}
        for index, spec in enumerate(specs):
            node = node_of(NodeId(f"node-{index:04d}"), spec)
            self.nodes[node.node_id] = node
            if policy.tiers.disk and policy.tiers.preloaded:
                fill(node, models)
        self.policy = policy
        self.replicas: dict[ModelName, dict[SimReplica, None]] = {model.name: {} for model in models}
        self.counters = Counters()
        self.changes = Changes(nodes=dict.fromkeys(self.nodes))
        self.serving = Serving(
            self.clock,
            self.models,
            self.replicas,
            changes=self.changes,
            counters=self.counters,
            ask=self.ask,
            timeout_seconds=timeout_seconds,
        )
        self.sessions, self.queues = self.serving.sessions, self.serving.queues
        self.waiting, self.idle = self.serving.waiting, self.serving.idle
        self._ids = itertools.count(1)
        self._asked = False
        self._more_comes = False
        self._wakes_seconds = 0.0
        """When the policy is asked next though nothing happens; in the past = never."""

    # --- running ---

    def run(self, requests: Sequence[Request]) -> None:
        """Serve the requests to the last one's end."""
        arrivals = iter(requests)
        self._next_arrival(arrivals)
        with _rare_collections():
            while self.clock.step():
                pass

    def _next_arrival(self, arrivals: Iterator[Request]) -> None:
        request = next(arrivals, None)
        self._more_comes = request is not None
        if request is not None:
            self.clock.at(request.arrival_seconds, lambda: self._arrive(request, arrivals))

    def _arrive(self, request: Request, arrivals: Iterator[Request]) -> None:
        self._next_arrival(arrivals)
        self.serving.arrive(request)

    @property
    def now(self) -> float:
        """Return the time, seconds."""
        return self.clock.now_seconds

    def ask(self) -> None:
        """Have the policy decide when all that happens now has happened."""
        if not self._asked:
            self._asked = True
            self.clock.then(self._decide)

    def _decide(self) -> None:
        self._asked = False
        again_seconds = self.policy.decide(self)
        self.changes.clear()
        if again_seconds is None or not self.is_alive:
            return
        if self._wakes_seconds <= self.now or again_seconds < self._wakes_seconds:
            self._wakes_seconds = again_seconds
            self.clock.at(again_seconds, self.ask)

    @property
    def is_alive(self) -> bool:
        """Tell whether anything is left to decide about."""
        return bool(self.waiting or self.idle or self._more_comes)

    # --- commands ---

    def start(self, model: ModelSpec, node: SimNode, devices: Sequence[int]) -> SimReplica:
        """Begin to load a model on free devices."""
        taken = [index for index in devices if node.owners[index] is not None]
        if taken or len(devices) < model.devices_on(node.spec.device):
            raise AssertionError(f"{node.node_id}: devices {taken} of {devices} are taken, or too few")
        tier = self.tier_of(model, node)
        replica = SimReplica(
            ReplicaId(f"{model.name}#{next(self._ids)}"),
            model,
            node,
            tuple(devices),
            self.now,
            tier,
            model.token_seconds(node.spec.device),
        )
        for index in devices:
            node.owners[index] = replica
        self.replicas[model.name][replica] = None
        self.counters.starts += 1
        self.counters.held_device_seconds -= self.now * len(devices)
        moved = self.counters.bytes_by_tier
        came_from = SHARED if self.loads.is_coming(node.node_id, model.name) else tier
        moved[came_from] = moved.get(came_from, 0) + model.weight_bytes
        replica.load = self.loads.begin(
            node.node_id,
            model.name,
            model.weight_bytes,
            source=self.source(tier, node),
            bus=Link("bus", sum(node.bus[index].bytes_per_second for index in devices)),
            fetched=lambda: self._keep(replica),
            done=lambda: self._loaded(replica),
        )
        self._touch(node)
        return replica

    def tier_of(self, model: ModelSpec, node: SimNode) -> str:
        """Return the best tier that holds a model on a node: `dram`, `disk` or `remote`."""
        if model.name in node.dram:
            return "dram"
        return "disk" if model.name in node.stored else "remote"

    def source(self, tier: str, node: SimNode) -> list[Link]:
        """Return what a load from a tier runs over until its bytes are in the host's memory."""
        return {"dram": [], "disk": [node.disk], "remote": [node.network]}[tier]

    def _loaded(self, replica: SimReplica) -> None:
        replica.load = None
        self._keep(replica)
        overhead_seconds = replica.node.spec.worker_start_seconds + replica.node.spec.overhead_seconds
        self.clock.after(overhead_seconds, lambda: self._ready(replica))

    def _keep(self, replica: SimReplica) -> None:
        """Leave the bytes in the tiers that they came through."""
        node, model, tiers = replica.node, replica.model, self.policy.tiers
        if tiers.disk and replica.tier == "remote":
            insert(node, node.stored, model, node.spec.disk_bytes)
        if tiers.dram:
            insert(node, node.dram, model, node.spec.dram_bytes)
        for kept in (node.dram, node.stored):
            if model.name in kept:
                kept.move_to_end(model.name)
        self._touch(node)

    def prefetch(self, model: ModelSpec, node: SimNode, ended: Callable[[bool], None]) -> None:
        """Bring a checkpoint into a host's memory before anybody asks; it gives way to every start there."""

        def arrived(complete: bool) -> None:  # noqa: FBT001 - a callback's only argument
            if complete:
                insert(node, node.dram, model, node.spec.dram_bytes)
                self._touch(node)
                self.ask()
            ended(complete)

        tier = self.tier_of(model, node)
        moved = self.counters.bytes_by_tier
        moved[AHEAD] = moved.get(AHEAD, 0) + model.weight_bytes
        source = self.source(tier, node)
        self.loads.fetch_ahead(node.node_id, model.name, model.weight_bytes, source=source, ended=arrived)

    def _ready(self, replica: SimReplica) -> None:
        if replica.phase is not Phase.STARTING:
            return
        replica.phase = Phase.READY
        replica.ready_seconds = replica.idle_since_seconds = self.now
        if replica.predicted_seconds is not None and self.now > replica.began_seconds:
            measured_seconds = self.now - replica.began_seconds
            error = abs(replica.predicted_seconds - measured_seconds) / measured_seconds
            self.counters.start_errors.append(error)
        self.idle[replica] = None
        self._touch(replica.node)
        self.changes.queues[replica.model.name] = None
        if replica.when_ready is not None:
            replica.when_ready()
        self.serving.serve(replica.model.name)
        self.ask()

    def stop(self, replica: SimReplica) -> None:
        """Free an idle replica's devices, or give up a start."""
        if replica.sessions:
            raise AssertionError(f"{replica.replica_id} serves somebody: preempt or migrate it")
        self._vacate(replica)
        self.counters.stops += 1

    def preempt(self, replica: SimReplica) -> None:
        """Take a busy replica's devices; its sessions begin again from their prompts."""
        self._interrupt(replica, keep_tokens=False)

    def displace(self, replica: SimReplica) -> None:
        """Take a busy replica's devices; its sessions wait, and go on elsewhere after their last token."""
        self._interrupt(replica, keep_tokens=True)

    def _interrupt(self, replica: SimReplica, *, keep_tokens: bool) -> None:
        interrupted = list(replica.sessions)
        self.counters.preemptions += not keep_tokens
        self.counters.displacements += keep_tokens
        for session in interrupted:
            self.serving.interrupt(session, keep_tokens=keep_tokens)
        self._vacate(replica)
        for session in reversed(interrupted):
            self.serving.enqueue(session, first=True)

    def migrate(self, replica: SimReplica, node: SimNode, devices: Sequence[int]) -> SimReplica:
        """Move a replica's sessions to a new one on another node; then its devices are free."""
        target = self.start(replica.model, node, devices)
        return self.migrate_to(replica, target)

    def migrate_to(self, replica: SimReplica, target: SimReplica) -> SimReplica:
        """Move a replica's sessions to one that is starting or idle."""
        self.counters.migrations += 1
        replica.moving_to = target
        target.awaits_move = True
        if target.phase is Phase.READY:
            self._copy(replica, target)
        else:
            target.when_ready = lambda: self._copy(replica, target)
        return target

    def shift(self, replica: SimReplica, target: SimReplica, count: int) -> None:
        """Move some of a replica's sessions, those with the fewest tokens, to another one that is ready."""
        for session in sorted(replica.sessions, key=self.tokens_of)[:count]:
            self.clock.after(self.copy_seconds(session), partial(self._shift, session, replica, target))

    def _shift(self, session: Session, replica: SimReplica, target: SimReplica) -> None:
        """Have a session go on at another replica, if both are still there, and it has a place."""
        if session.replica is replica and target.free_places > 0:
            self.counters.shifts += 1
            self.serving.move(session, target, pause_seconds=SWITCH_SECONDS)
            self.serving.serve(replica.model.name)
            self.ask()

    def _copy(self, replica: SimReplica, target: SimReplica) -> None:
        copy_seconds = max((self.copy_seconds(session) for session in replica.sessions), default=0.0)
        self.clock.after(copy_seconds, lambda: self._switch(replica, target))

    def tokens_of(self, session: Session) -> int:
        """Return how many tokens a running session has by now, its prompt included."""
        return self.serving.tokens_of(session)

    def copy_seconds(self, session: Session) -> float:
        """Return how long a session's cache takes to be at another node while it goes on.

        The quicker of shipping it and of computing it again from its tokens.
        """
        replica = session.replica
        if replica is None:
            return 0.0
        model, spec = replica.model, replica.node.spec
        tokens = self.tokens_of(session)
        shipped = tokens * model.kv_bytes_per_token / spec.network_bytes_per_second
        return min(shipped, model.prefill_seconds(spec.device, tokens))

    def _switch(self, replica: SimReplica, target: SimReplica) -> None:
        target.awaits_move = False
        if target.phase is Phase.GONE or replica.phase is Phase.GONE:
            replica.moving_to = None
            return
        for session in list(replica.sessions):
            self.serving.move(session, target, pause_seconds=SWITCH_SECONDS)
        self._vacate(replica)
        self._touch(target.node)
        self.serving.serve(replica.model.name)
        self.ask()

    def _vacate(self, replica: SimReplica) -> None:
        if replica.load is not None:
            self.loads.cancel(replica.load)
            replica.load = None
        replica.phase = Phase.GONE
        self.idle.pop(replica, None)
        for index in replica.devices:
            replica.node.owners[index] = None
        del self.replicas[replica.model.name][replica]
        self.changes.queues[replica.model.name] = None
        self.changes.gone.append(replica)
        self.counters.held_device_seconds += self.now * len(replica.devices)
        self._touch(replica.node)
        self.ask()

    # --- failures ---

    def fail_node(self, node: SimNode, *, for_seconds: float) -> None:
        """Take a host away with all that runs there and its memory; its disk survives."""
        node.down = True
        for replica in node.replicas:
            if replica.sessions:
                self._interrupt(replica, keep_tokens=self.policy.keeps_tokens)
            else:
                self._vacate(replica)
        self.loads.give_up_ahead(node.node_id)
        node.moved.update(dict.fromkeys(node.dram))
        node.dram.clear()
        node.holdings += 1
        self._touch(node)

        def back() -> None:
            node.down = False
            self._touch(node)
            self.ask()

        self.clock.after(for_seconds, back)

    def _touch(self, node: SimNode) -> None:
        self.changes.nodes[node.node_id] = None


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for cyclic garbage rarely: a run makes hardly any, and walking through all of it takes long."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
