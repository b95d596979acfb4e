"""How long a start would take: DESIGN section 5, as pure functions that keep their parts for the explanation.

    load(n, m)  = max over pipeline stages s of (queue_bytes(n, s) + B) / bandwidth(n, s)
    start(n, m) = worker(n) + max(load(n, m), skeleton(m)) + first_forward(m)

Stages overlap, so a load is as slow as its slowest stage, not their sum. Skeleton and first forward are the
medians of the model's last measured starts; until there is one, seeds stand in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from services.controller.view import Held, Model, Node, Stage, StartStages, View
from stoker.ids import NodeId
from stoker.units import GB

SEED_BYTES_PER_SECOND: Mapping[str, float] = {
    "disk": 1.0 * GB,  # a SATA or network SSD; NVMe is learnt within one load
    "page_cache": 4.0 * GB,
    "peer": 1.0 * GB,  # 10 Gbit/s Ethernet
    "remote": 0.1 * GB,
    "device": 12.0 * GB,  # PCIe 3.0 x16
}
"""Rates that stand in until a store has measured its own: deliberately modest."""

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
        skeleton_seconds: Building the modules, beside the load.
        first_forward_seconds: The warm-up pass.
        stop_seconds: Before all that: freeing the slot; 0 when one is free.
        overhead_seconds: What the parts above have not explained in earlier starts (attaching, reporting).
        tier: Best tier that holds all of the checkpoint there: `dram` or `disk`.
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
            + max(self.load_seconds, self.skeleton_seconds)
            + self.first_forward_seconds
            + self.overhead_seconds
        )


def start_estimate(  # noqa: PLR0913 - what an estimate is made of, each named by its caller
    model: Model,
    node: Node,
    *,
    measured: tuple[StartStages, ...],
    loading_bytes: int,
    starting_workers: int,
    stop_seconds: float = 0.0,
) -> Estimate:
    """Estimate the start of `model` on `node`.

    Args:
        model: What to start.
        node: Where.
        measured: The model's last starts.
        loading_bytes: Bytes other replicas that start on the node still read from its slowest tier.
        starting_workers: Replicas ordered there that may take a warm worker first.
        stop_seconds: What must be waited for before.
    """
    held = node.held.get((model.checkpoint_uri, model.revision), Held())
    missing_bytes = max(0, model.file_bytes - held.dram_bytes)
    return Estimate(
        worker_seconds=_worker_seconds(node, starting_workers),
        stage_seconds=_load_stages(model, node, missing_bytes, loading_bytes),
        skeleton_seconds=_learnt(
            [start.skeleton_seconds for start in measured],
            SEED_SKELETON_SECONDS + SEED_SKELETON_SECONDS_PER_LAYER * model.layers,
        ),
        first_forward_seconds=_learnt(
            [start.first_forward_seconds for start in measured], SEED_FIRST_FORWARD_SECONDS
        ),
        stop_seconds=stop_seconds,
        overhead_seconds=_learnt([_unexplained_seconds(start) for start in measured], SEED_OVERHEAD_SECONDS),
        tier="dram" if missing_bytes == 0 else "disk",
    )


def loading_bytes_by_node(view: View) -> Mapping[NodeId, int]:
    """Return what the replicas that are not ready yet must still read, by node."""
    waiting: dict[NodeId, int] = {}
    for reservation in view.reservations.values():
        model, node = view.models.get(reservation.model), view.nodes.get(reservation.node_id)
        if model is None or node is None:
            continue
        replica = node.replicas.get(reservation.replica_id)
        if replica is not None and replica.ready_since_seconds is not None:
            continue
        held = node.held.get((model.checkpoint_uri, model.revision), Held())
        missing_bytes = max(0, model.file_bytes - held.dram_bytes)
        waiting[reservation.node_id] = waiting.get(reservation.node_id, 0) + missing_bytes
    return waiting


def _unexplained_seconds(start: StartStages) -> float:
    explained = (
        start.worker_seconds
        + max(start.weights_seconds, start.skeleton_seconds)
        + start.first_forward_seconds
    )
    return max(0.0, start.total_seconds - explained)


def _worker_seconds(node: Node, starting_workers: int) -> float:
    if node.warm_workers > starting_workers:
        return 0.0
    return node.worker_start_seconds or SEED_WORKER_SECONDS


def _load_stages(model: Model, node: Node, missing_bytes: int, loading_bytes: int) -> dict[str, float]:
    stages: dict[str, float] = {}
    if missing_bytes:
        disk = _stage(node, "disk")
        queued_bytes = max(disk.queued_bytes, loading_bytes)
        stages["disk"] = (queued_bytes + missing_bytes) / disk.bytes_per_second
    if any(device.kind != "cpu" for device in node.devices):  # on a CPU the tensors are the pool's memory
        device = _stage(node, "device")
        stages["device"] = (device.queued_bytes + model.file_bytes) / device.bytes_per_second
    return stages


def _stage(node: Node, name: str) -> Stage:
    stage = node.stages.get(name)
    if stage is None or stage.bytes_per_second <= 0:
        return Stage(
            bytes_per_second=SEED_BYTES_PER_SECOND[name],
            queued_bytes=stage.queued_bytes if stage else 0,
        )
    return stage


def _learnt(values: list[float], seed: float) -> float:
    return median(values) if values else seed
