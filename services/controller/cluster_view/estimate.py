"""How long a start would take: DESIGN section 5, as pure functions that keep their parts for the explanation.

    load(n, m)  = max over pipeline stages s of (queue_bytes(n, s) + B) / bandwidth(n, s)
    start(n, m) = worker(n) + max(load(n, m), skeleton(m) + first_forward(m)) + overhead(m)

Stages overlap, so a load is as slow as its slowest stage, not their sum (the ranks of one replica share a
disk and a network, and have a device each); the first forward pass runs over the layers that are there while
the rest is on its way. Where an engine does not overlap them, the difference is in `overhead`, which is
learnt: what the other terms left unexplained. Skeleton, first forward and overhead are medians of the model's
last measured starts; until there is one, seeds stand in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

from services.controller.cluster_view.bandwidth import rate_of
from services.controller.cluster_view.frozen import maker_of
from services.controller.cluster_view.learnt import StartStages
from services.controller.cluster_view.streaming import has_own_memory, streams_on
from services.controller.cluster_view.view import Held, Model, Node, Stage
from stoker.units import GB

SEED_BYTES_PER_SECOND: Mapping[str, float] = {
    "disk": 1.0 * GB,  # a SATA or network SSD; NVMe is learnt within one load
    "page_cache": 4.0 * GB,
    "peer": 1.0 * GB,  # 10 Gbit/s Ethernet
    "remote": 0.1 * GB,
    "device": 12.0 * GB,  # PCIe 3.0 x16
}
"""Rates that stand in until a store has measured its own: deliberately modest."""

SEED_OPENING_SECONDS: Mapping[str, float] = {"remote": 0.3, "peer": 0.3}
"""Before the first byte, until starts from there were measured; `benchmarks/estimates.py` on two cores."""

SEED_WORKER_SECONDS = 6.0
"""Importing torch and transformers and warming a thread pool, where no agent has measured it."""
SEED_SKELETON_SECONDS = 0.1
SEED_SKELETON_SECONDS_PER_LAYER = 0.002
SEED_FIRST_FORWARD_SECONDS = 0.05
SEED_OVERHEAD_SECONDS = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A predicted start, with its parts.

    Attributes:
        worker_seconds: Until a worker takes the order; 0 when one waits.
        stage_seconds: Each stage of the load, queue included.
        skeleton_seconds: Building the modules and giving them their tensors, beside the load.
        first_forward_seconds: The warm-up pass.
        stop_seconds: Before all that: freeing the slot; 0 when one is free.
        overhead_seconds: What the parts above have not explained in earlier starts (attaching, reporting).
        tier: Best tier that gives all of the checkpoint there: `dram`, `disk`, `peer` or `remote`.
    """

    worker_seconds: float
    stage_seconds: Mapping[str, float]
    skeleton_seconds: float
    first_forward_seconds: float
    stop_seconds: float = 0.0
    overhead_seconds: float = 0.0
    tier: str = "disk"

    @property
    def load_seconds(self) -> float:
        """The slowest stage; 0 where the bytes already are where they are used."""
        return max(self.stage_seconds.values(), default=0.0)

    @property
    def total_seconds(self) -> float:
        """From the decision to ready."""
        return (
            self.stop_seconds
            + self.worker_seconds
            + max(self.load_seconds, self.skeleton_seconds + self.first_forward_seconds)
            + self.overhead_seconds
        )


make_estimate = maker_of(Estimate)
"""The same as the constructor, faster: every decision makes some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearntParts:
    """The parts of a start that depend on the model alone."""

    skeleton_seconds: float
    first_forward_seconds: float
    overhead_seconds: float

    def start_seconds(self, before_seconds: float, load_seconds: float) -> float:
        """Return a start's total, given what must be waited for before it and its load."""
        return (
            before_seconds
            + max(load_seconds, self.skeleton_seconds + self.first_forward_seconds)
            + self.overhead_seconds
        )


def start_estimate(  # noqa: PLR0913 - what an estimate is made of, each named by its caller
    model: Model,
    node: Node,
    *,
    parts: LearntParts,
    loading_bytes: int,
    starting_workers: int,
    stop_seconds: float = 0.0,
    has_peer: bool = False,
    is_coming: bool = False,
) -> Estimate:
    """Estimate the start of `model` on `node`.

    Args:
        model: What to start.
        node: Where.
        parts: What the model's last starts say; see `learnt_parts`.
        loading_bytes: Bytes other replicas that start on the node still read from its slowest tier.
        starting_workers: Workers that replicas ordered there may take first.
        stop_seconds: What must be waited for before.
        has_peer: Another node holds all of the checkpoint.
        is_coming: Another start on the node reads the checkpoint already: it is in `loading_bytes`, and read
            once for both.
    """
    source, missing_bytes = _missing(model, node, has_peer=has_peer, is_coming=is_coming)
    return make_estimate(
        worker_seconds=worker_wait_seconds(node, starting_workers, model.devices),
        stage_seconds=_load_stages(model, node, source, missing_bytes, loading_bytes),
        skeleton_seconds=parts.skeleton_seconds,
        first_forward_seconds=parts.first_forward_seconds,
        stop_seconds=stop_seconds,
        overhead_seconds=parts.overhead_seconds,
        tier=source or "dram",
    )


def learnt_parts(model: Model, measured: tuple[StartStages, ...]) -> LearntParts:
    """Return the medians of the model's last starts, or seeds."""
    if not measured:
        return _seed_parts(model.layers)
    return LearntParts(
        skeleton_seconds=median([start.skeleton_seconds for start in measured]),
        first_forward_seconds=median([start.first_forward_seconds for start in measured]),
        overhead_seconds=median([unexplained_seconds(start) for start in measured]),
    )


@lru_cache(maxsize=1024)
def _seed_parts(layers: int) -> LearntParts:
    return LearntParts(
        skeleton_seconds=seed_skeleton_seconds(layers),
        first_forward_seconds=SEED_FIRST_FORWARD_SECONDS,
        overhead_seconds=SEED_OVERHEAD_SECONDS,
    )


def load_seconds(
    model: Model, node: Node, *, loading_bytes: int, has_peer: bool, is_coming: bool = False
) -> float:
    """Return how long a load takes: `load_seconds` of `start_estimate`, without the rest of it."""
    source, missing_bytes = _missing(model, node, has_peer=has_peer, is_coming=is_coming)
    return max(_load_stages(model, node, source, missing_bytes, loading_bytes).values(), default=0.0)


def source_of(model: Model, held: Held, *, has_peer: bool) -> str:
    """Return the tier that the bytes missing from a node's memory come from."""
    if model.origin == "disk" or held.disk_bytes >= model.file_bytes:
        return "disk"
    return "peer" if has_peer else "remote"


def seed_skeleton_seconds(layers: int) -> float:
    """Return what a skeleton is taken to cost until one was measured."""
    return SEED_SKELETON_SECONDS + SEED_SKELETON_SECONDS_PER_LAYER * layers


def worker_wait_seconds(node: Node, starting_workers: int, devices: int = 1) -> float:
    """Return how long an order waits until it has its workers: one for each device, all or none.

    Those that are missing are started side by side; the next one that is coming helps where only one is.

    Args:
        node: Where.
        starting_workers: Those that earlier orders may take and have not taken yet.
        devices: How many the replica occupies.
    """
    missing = starting_workers + devices - node.warm_workers
    if missing <= 0:
        return 0.0
    whole_seconds = worker_start_seconds(node)
    if node.next_worker_seconds > 0 and missing == 1:
        return min(whole_seconds, node.next_worker_seconds)
    return whole_seconds


def worker_start_seconds(node: Node) -> float:
    """Return how long a worker takes to be spawned and warm."""
    return node.worker_start_seconds or SEED_WORKER_SECONDS


def bytes_per_second(node: Node, stage: str) -> float:
    """Return a stage's rate: learnt from its starts, else as its store says or as elsewhere, else a seed."""
    learnt = node.learnt.get(stage)
    if learnt is not None and learnt.weight > 0:
        return rate_of(learnt)
    reported = node.stages.get(stage)
    if reported is not None and reported.bytes_per_second > 0:
        return reported.bytes_per_second
    return rate_of(learnt) if learnt is not None else SEED_BYTES_PER_SECOND[stage]


def opening_seconds(node: Node, source: str) -> float:
    """Return what passes before the first byte of a checkpoint comes: a far one's headers are read first."""
    return node.opening.get(source, SEED_OPENING_SECONDS.get(source, 0.0))


def unexplained_seconds(start: StartStages) -> float:
    """Return what no stage of a measured start explains."""
    explained = start.worker_seconds + max(
        start.weights_seconds, start.skeleton_seconds + start.first_forward_seconds
    )
    return max(0.0, start.total_seconds - explained)


def _missing(model: Model, node: Node, *, has_peer: bool, is_coming: bool) -> tuple[str, int]:
    """Return where the bytes that are not in the node's memory come from, and how many it still has to read.

    All there = ("", 0). A start that comes to another one's window late reads everything again.
    """
    held = node.held.get(model.checkpoint, NOTHING_HELD)
    if streams_on(model, node):
        return source_of(model, held, has_peer=has_peer), model.file_bytes
    missing_bytes = max(0, model.file_bytes - held.dram_bytes)
    source = source_of(model, held, has_peer=has_peer) if missing_bytes else ""
    return source, 0 if is_coming else missing_bytes


def device_bytes(model: Model) -> float:
    """Return what is copied to each device: ranks have a link and an equal part of the weights each."""
    return model.file_bytes / model.devices


def _load_stages(
    model: Model, node: Node, source: str, missing_bytes: int, loading_bytes: int
) -> dict[str, float]:
    stages: dict[str, float] = {}
    if source:
        queued_bytes = max(node.stages.get(source, NOTHING).queued_bytes, loading_bytes)
        stages[source] = opening_seconds(node, source) + (queued_bytes + missing_bytes) / bytes_per_second(
            node, source
        )
    if has_own_memory(node) or streams_on(model, node):
        queued_bytes = node.stages.get("device", NOTHING).queued_bytes
        stages["device"] = (queued_bytes + device_bytes(model)) / bytes_per_second(node, "device")
    return stages


NOTHING = Stage(bytes_per_second=0.0)

NOTHING_HELD = Held()
