"""Policies to compare with: those the paper compared with, each as it describes them.

All of them start one more replica for each waiting request that none is being started for, and give devices
of replicas that nobody uses to who waits; they differ in where they start and where bytes come from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from services.controller.simulation.hardware import ModelSpec
from services.controller.simulation.parts import Phase, SimNode, SimReplica, Tiers
from services.controller.simulation.world import World


class AnyNode:
    """A random node with free devices: what serverless platforms do ("Serverless" in the paper).

    Args:
        name: For the table.
        tiers: Where bytes come from: with dram and disk it has the paper's loader, without them it downloads
            at every start (Ray Serve); with disk as a cache it is Ray Serve with a cache.
        seed: Of its choices.
    """

    keeps_tokens = False

    def __init__(self, name: str, tiers: Tiers, *, seed: int) -> None:
        self.name = name
        self.tiers = tiers
        self._random = random.Random(seed)  # noqa: S311 - a simulation's draws, repeatable by seed

    def decide(self, world: World) -> float | None:
        """See `Decider`."""
        for name in list(world.waiting):
            model = world.models[name]
            for _ in range(wanted(world, model)):
                if not self._start(world, model):
                    return retire(world)
        return retire(world)

    def _start(self, world: World, model: ModelSpec) -> bool:
        places = [node for node in world.nodes.values() if _has_room(node, model, ())]
        if places:
            node = self._random.choice(places)
            world.start(model, node, node.free_devices[: model.devices_on(node.spec.device)])
            return True
        places = [node for node in world.nodes.values() if _has_room(node, model, idle(node))]
        if not places:
            return False
        node = self._random.choice(places)
        make_room(world, node, model)
        world.start(model, node, node.free_devices[: model.devices_on(node.spec.device)])
        return True


def wanted(world: World, model: ModelSpec) -> int:
    """Return how many more replicas the waiting requests of a model want."""
    coming = sum(
        model.concurrency
        for replica in world.replicas[model.name]
        if replica.phase is Phase.STARTING and not replica.awaits_move
    )
    missing = -(-(len(world.queues[model.name]) - coming) // model.concurrency)
    return max(0, min(missing, model.max_replicas - len(world.replicas[model.name])))


def idle(node: SimNode) -> list[SimReplica]:
    """Return a node's replicas that nobody uses, the longest unused first."""
    found = [replica for replica in node.replicas if replica.is_idle]
    return sorted(found, key=lambda replica: (replica.idle_since_seconds or 0.0, replica.replica_id))


def make_room(world: World, node: SimNode, model: ModelSpec) -> None:
    """Stop unused replicas, the longest unused first, until the model fits."""
    for replica in idle(node):
        if len(node.free_devices) >= model.devices_on(node.spec.device):
            return
        world.stop(replica)


def retire(world: World) -> float | None:
    """Stop replicas whose keep-alive is over; return when the next one's is."""
    due_seconds = []
    for replica in list(world.idle):
        if not replica.is_idle or replica.idle_since_seconds is None:
            continue
        until_seconds = replica.idle_since_seconds + replica.model.kept_seconds(replica.node.spec)
        if until_seconds <= world.now:
            world.stop(replica)
        else:
            due_seconds.append(until_seconds)
    return min(due_seconds, default=None)


def _has_room(node: SimNode, model: ModelSpec, unused: Sequence[SimReplica]) -> bool:
    free = len(node.free_devices) + sum(len(replica.devices) for replica in unused)
    return not node.down and free >= model.devices_on(node.spec.device)


def serverless(seed: int) -> AnyNode:
    """Return the paper's "Serverless": its loader, a random node."""
    return AnyNode("random node (Serverless)", Tiers(), seed=seed)


def ray_serve(seed: int) -> AnyNode:
    """Return "Ray Serve": a random node, downloading at every start."""
    return AnyNode("download (Ray Serve)", Tiers(dram=False, disk=False, preloaded=False), seed=seed)


def ray_serve_with_cache(seed: int) -> AnyNode:
    """Return "Ray Serve with cache": a random node whose disk keeps the last used checkpoints."""
    return AnyNode("disk cache (Ray Serve)", Tiers(dram=False, preloaded=False), seed=seed)
