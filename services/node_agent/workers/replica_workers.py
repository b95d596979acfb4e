"""Which workers make up a replica: one, or one for each tensor-parallel rank of its checkpoint. Pure.

Rules:
1. A replica of N ranks takes N workers at once, each with one of the devices that its order lists.
2. The first one has the sessions, and speaks for the replica.
3. It takes sessions when the first one does, which has met all others then, and is complete when the weights
   of all are there. The end of any of them is the end of all.
4. Each holds its own slot until its own process has ended.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from services.node_agent.host_state import Hosted, LoadModel, Worker, WorkerPhase
from stoker.errors import InvalidRequest
from stoker.ids import ReplicaId, WorkerId
from stoker.v1.node_agent_pb2 import StartReplicaRequest
from stoker.v1.rank_group_pb2 import RankGroup
from stoker.v1.worker_pb2 import LoadModelResponse

SOCKET_SUFFIX = ".rank"
"""Of the first rank's socket for the others; else it has the name of that worker's own."""
STORE_SUFFIX = ".meet"
"""Of the file through which ranks find each other, likewise."""


def shares_of(order: StartReplicaRequest) -> list[tuple[int, ...]]:
    """Return the devices of each worker that an order takes.

    Raises:
        InvalidRequest: It has not one device for each rank.
    """
    ranks = order.checkpoint.tensor_parallel
    if ranks <= 1:
        return [tuple(order.devices)]
    if len(order.devices) != ranks:
        raise InvalidRequest(
            f"replica {order.replica_id} has {ranks} tensor-parallel ranks and {len(order.devices)} devices; "
            "each rank takes one",
            param="devices",
        )
    return [(device,) for device in order.devices]


def workers_needed(waiting: Collection[Hosted]) -> int:
    """Return how many workers orders take that wait for them."""
    return sum(len(shares_of(hosted.order)) for hosted in waiting)


def workers_of(workers: Collection[Worker], replica_id: ReplicaId) -> Sequence[Worker]:
    """Return the workers of a replica that have not ended."""
    return [worker for worker in workers if worker.replica_id == replica_id]


def handed_over(
    hosted: Hosted, taken: Sequence[Worker], now_seconds: float
) -> list[tuple[Worker, LoadModel]]:
    """Return a replica's workers as they are when they have its order, and what each is told.

    Args:
        hosted: The replica.
        taken: Warm workers, as many as it takes.
        now_seconds: When.
    """
    shares = shares_of(hosted.order)
    return [
        (
            replace(
                worker,
                phase=WorkerPhase.LOADING,
                since_seconds=now_seconds,
                replica_id=hosted.replica_id,
                devices=devices,
            ),
            LoadModel(
                worker_id=worker.worker_id,
                order=hosted.order,
                devices=devices,
                first_worker_id=taken[0].worker_id,
                rank=rank,
                ranks=len(shares),
            ),
        )
        for rank, (worker, devices) in enumerate(zip(taken, shares, strict=True))
    ]


def with_loaded(hosted: Hosted, workers: Collection[Worker], now_seconds: float) -> Hosted:
    """Return a replica that takes sessions as its workers have it: loading while one of them still is.

    Args:
        hosted: The replica.
        workers: Its own; as long as the first one has not answered, nothing changes.
        now_seconds: When.
    """
    first = next((worker.loaded for worker in workers if worker.worker_id == hosted.worker_id), None)
    if first is None:
        return hosted
    loaded = LoadModelResponse()
    loaded.CopyFrom(first)
    loaded.loading = any(worker.loaded is None or worker.loaded.loading for worker in workers)
    has_ended = hosted.is_loading and not loaded.loading
    complete_seconds = now_seconds if has_ended else hosted.complete_seconds
    return replace(hosted, loaded=loaded, complete_seconds=complete_seconds)


def group_of(load: LoadModel, run_dir: Path) -> RankGroup | None:
    """Return where the ranks of a replica meet, and which one a worker is; None: it is the only one."""
    if load.ranks <= 1 or load.first_worker_id is None:
        return None
    place = socket_path(run_dir, load.first_worker_id)
    return RankGroup(
        rank=load.rank,
        ranks=load.ranks,
        store_file=str(place.with_suffix(STORE_SUFFIX)),
        socket=str(place.with_suffix(SOCKET_SUFFIX)),
    )


def socket_path(run_dir: Path, worker_id: WorkerId) -> Path:
    """Return where a worker listens."""
    return run_dir / f"worker-{worker_id}.sock"
