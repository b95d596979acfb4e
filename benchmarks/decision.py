"""How long one placement takes, on one core: 1,000 nodes of 8 devices, 10,000 models; and how that grows.

    python benchmarks/decision.py [--placements 300] [--nodes 10,100,1000,10000]

A cluster is made up from a seed: learnt rates of disks and buses that all differ, stores that hold some of
the most popular checkpoints in memory, devices occupied by busy and idle replicas. Then cold models ask, one
after the other; each answer is folded into the view (the slot is reserved): the next one meets another view.
Timed is what the controller does for one placement: the decision, and the fold. Three clusters: with free
slots, full but partly idle, and full with running replicas that may be moved.

Times are processor time of this thread, so that other work on the machine does not count. What the set-up
left is frozen, as a service freezes what it holds once it has started; collections of what comes after
count, as rare as the controller makes them. Making up a cluster takes 2 ms per node: half a minute of
processor time for each of 10,000 nodes.

Target: at 1,000 nodes at most 1 ms in the median and 5 ms at the 99th percentile, in each cluster.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from arguments import positives, several
from immutables import Map
from setting import print_heading

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from services.controller.cluster_view.events import Demanded, DemandEnded, Reserved, StopOrdered  # noqa: E402 - path first
from services.controller.cluster_view.fold import fold  # noqa: E402 - path first
from services.controller.cluster_view.index import indexed  # noqa: E402 - path first
from services.controller.cluster_view.view import (  # noqa: E402 - path first
    Device,
    Held,
    Model,
    Node,
    Phase,
    Policy,
    Pool,
    Replica,
    Reservation,
    Stage,
    View,
)
from services.controller.garbage import collect_rarely  # noqa: E402 - path first
from services.controller.placement.place import Decision, Placed, StopIdle, place  # noqa: E402 - path first
from stoker.ids import CheckpointUri, ModelName, NodeId, ReplicaId, Revision  # noqa: E402 - path first
from stoker.units import GB  # noqa: E402 - path first

DEVICES = 8
MODELS_PER_NODE = 10
HELD_PER_NODE = 12
NOW_SECONDS = 10_000.0
TARGET_NODES = 1_000
TARGET_MEDIAN_SECONDS = 0.001
TARGET_P99_SECONDS = 0.005
SIZES_BYTES = (14 * GB, 26 * GB, 60 * GB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of cluster: shares of its slots that are free and idle, and whether replicas may be moved."""

    name: str
    free: float
    idle: float
    may_migrate: bool = False


KINDS = (
    Kind(name="free slots", free=0.1, idle=0.4),
    Kind(name="full, idle ones", free=0.0, idle=0.4),
    Kind(name="moves allowed", free=0.03, idle=0.1, may_migrate=True),
)


def cluster(nodes: int, kind: Kind, seed: int) -> View:
    """Return a cluster made up from a seed."""
    dice = random.Random(seed)
    models = [_model(index, dice) for index in range(nodes * MODELS_PER_NODE)]
    reservations: dict[ReplicaId, Reservation] = {}
    made: dict[NodeId, Node] = {}
    for number in range(nodes):
        node_id = NodeId(f"node-{number:05}")
        replicas: dict[ReplicaId, Replica] = {}
        for device in range(DEVICES):
            lot = dice.random()
            if lot < kind.free:
                continue
            model = models[int(len(models) * dice.random() ** 3)]
            replica = _replica(f"{node_id}-{device}", model, device, dice, idle=lot < kind.free + kind.idle)
            replicas[replica.replica_id] = replica
            reservations[replica.replica_id] = Reservation(
                replica_id=replica.replica_id,
                model=model.name,
                node_id=node_id,
                devices=(device,),
                runtime="v1",
                reported=True,
            )
        made[node_id] = _node(node_id, replicas, models, dice)
    return indexed(
        View(
            models=Map({model.name: model for model in models}),
            nodes=Map(made),
            reservations=Map(reservations),
        )
    )


def _model(index: int, dice: random.Random) -> Model:
    size_bytes = dice.choice(SIZES_BYTES)
    return Model(
        name=ModelName(f"model-{index:06}"),
        checkpoint_uri=CheckpointUri(f"s3://models/{index:06}"),
        revision=Revision("1"),
        architecture="LlamaForCausalLM",
        file_bytes=size_bytes,
        weight_bytes=size_bytes,
        runtime="v1",
        layers=32,
        max_replicas=1_000,
        origin="remote",
    )


def _replica(replica_id: str, model: Model, device: int, dice: random.Random, *, idle: bool) -> Replica:
    return Replica(
        replica_id=ReplicaId(replica_id),
        model=model.name,
        phase=Phase.READY,
        devices=(device,),
        sessions=0 if idle else 1,
        idle_since_seconds=NOW_SECONDS - dice.uniform(3, 300) if idle else None,
        ready_since_seconds=NOW_SECONDS - 400,
        context_tokens=0 if idle else dice.randint(50, 4000),
    )


def _node(
    node_id: NodeId, replicas: dict[ReplicaId, Replica], models: list[Model], dice: random.Random
) -> Node:
    held = {}
    for _ in range(HELD_PER_NODE):
        model = models[int(len(models) * dice.random() ** 3)]
        in_memory = dice.random() < 1 / 3
        held[model.checkpoint] = Held(
            dram_bytes=model.file_bytes if in_memory else 0, disk_bytes=model.file_bytes
        )
    rates = {"remote": 1.2, "peer": 1.2, "disk": 6.0, "device": 25.0}
    return Node(
        node_id=node_id,
        devices=tuple(Device(index=index, kind="cuda", memory_bytes=80 * GB) for index in range(DEVICES)),
        replicas=replicas,
        held=held,
        stages={
            stage: Stage(bytes_per_second=gigabytes * GB * dice.uniform(0.7, 1.3))
            for stage, gigabytes in rates.items()
        },
        pool=Pool(total_bytes=1000 * GB),
        architectures=frozenset({"LlamaForCausalLM"}),
        warm_workers=dice.choice((0, 1, 1, 1)),
        worker_start_seconds=dice.uniform(4.0, 8.0),
        last_seen_seconds=NOW_SECONDS,
    )


def placements(view: View, kind: Kind, count: int, seed: int) -> tuple[list[float], int]:
    """Return the processor seconds of each placement, and how many of them found a place."""
    dice = random.Random(seed)
    policy = Policy(may_migrate=kind.may_migrate)
    cold = sorted(set(view.models) - {reservation.model for reservation in view.reservations.values()})
    seconds, found = [], 0
    for number in range(count):
        name = cold[int(len(cold) * dice.random() ** 2)]
        view = fold(view, Demanded(model=name, now_seconds=NOW_SECONDS))
        begun = time.thread_time()
        decision = place(view, name, NOW_SECONDS, policy)
        view = _folded(view, name, decision, number)
        seconds.append(time.thread_time() - begun)
        found += hasattr(decision, "node_id")
        view = fold(view, DemandEnded(model=name))
    return seconds, found


def _folded(view: View, name: ModelName, decision: Decision, number: int) -> View:
    match decision:
        case Placed(node_id=node_id, devices=devices):
            reservation = Reservation(
                replica_id=ReplicaId(f"new-{number}"),
                model=name,
                node_id=node_id,
                devices=devices,
                runtime="v1",
                seen_seconds=NOW_SECONDS,
            )
            return fold(view, Reserved(reservation=reservation))
        case StopIdle(victims=victims):
            for victim in victims:
                view = fold(view, StopOrdered(replica_id=victim, now_seconds=NOW_SECONDS, for_model=name))
            return view
        case _:
            return view


def main() -> None:
    """Measure, print, and exit 0 when the target is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--placements", type=several, default=300)
    parser.add_argument("--nodes", type=positives, default="10,100,1000,10000")
    asked = parser.parse_args()
    print_heading("One placement: decision and fold")
    collect_rarely()
    print(f"{'nodes':>6} {'models':>7}  {'cluster':<16} {'median':>9} {'p99':>9} {'placed':>7}")
    worst_median = worst_p99 = 0.0
    for nodes in asked.nodes:
        for kind in KINDS:
            gc.unfreeze()
            gc.collect()  # the cluster before
            gc.disable()  # millions of objects that stay: walking through them again and again finds nothing
            view = cluster(nodes, kind, seed=7)
            gc.freeze()
            gc.enable()
            placements(view, kind, 20, seed=1)  # warm up
            seconds, found = placements(view, kind, asked.placements, seed=2)
            middle, tail = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
            print(
                f"{nodes:>6} {nodes * MODELS_PER_NODE:>7}  {kind.name:<16} {middle * 1000:>6.3f} ms "
                f"{tail * 1000:>6.3f} ms {found / asked.placements:>6.0%}",
                flush=True,
            )
            if nodes == TARGET_NODES:
                worst_median, worst_p99 = max(worst_median, middle), max(worst_p99, tail)
    if TARGET_NODES not in asked.nodes:
        print(f"not judged: the target is for {TARGET_NODES} nodes, and --nodes names {asked.nodes}")
        sys.exit(1)
    met = worst_median <= TARGET_MEDIAN_SECONDS and worst_p99 <= TARGET_P99_SECONDS
    print(
        f"at {TARGET_NODES} nodes: median {worst_median * 1000:.3f} ms "
        f"(target {TARGET_MEDIAN_SECONDS * 1000:g}), "
        f"p99 {worst_p99 * 1000:.3f} ms (target {TARGET_P99_SECONDS * 1000:g}): {'met' if met else 'NOT met'}"
    )
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
