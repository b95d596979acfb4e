"""Loads one rank of a model: the first one gives an engine, the others one that follows it.

Each makes its passes before all of its weights are there: a module waits for its own, and the ranks wait for
each other in the sums of the pass. A pass of several ranks can't be given up half-way, so nothing interrupts
these waits. Rank 0 listens before the ranks meet, and has all of them before it waits for a weight.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from services.worker.engine.adapter_cache import AdapterCache
from services.worker.engine.protocol import EngineLimits
from services.worker.engine.transformers_engine import TransformersEngine
from services.worker.load import ENGINE, LoadedModel, config_of, dtype_named, limits_for, weights_for
from services.worker.memory import device_of, refuse_what_cannot_fit
from services.worker.model_loading import build_skeleton
from services.worker.ranks.cut_model import add_biases_once, cut_skeleton, deals_out_heads
from services.worker.ranks.follower import Follower
from services.worker.ranks.leading_runner import LeadingRunner
from services.worker.ranks.meeting import RankMeeting
from services.worker.ranks.order_socket import OrderReader, OrderSender
from services.worker.weights.arrival import Arrival
from services.worker.weights.arrival_order import arrival_order
from services.worker.weights.module_waits import wait_for_weights
from services.worker.weights.weights_gate import WeightsGate
from stoker.attach import attach
from stoker.errors import CheckpointInvalid, InvalidRequest
from stoker.models.weights import assign_weights
from stoker.v1.start_pb2 import StartTimings

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch
    from torch import nn

    from services.worker.load import Weights
    from services.worker.settings import WorkerSettings
    from services.worker.weights.pool_lock import LockedPool
    from stoker.attach import Attachment, Loaded
    from stoker.v1.model_pb2 import AdapterSpec
    from stoker.v1.worker_pb2 import LoadModelRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedFollower:
    """A rank that is ready to follow; `timings`, `gate`, `weights` and `loaded` as in `LoadedModel`."""

    follower: Follower
    orders: OrderReader
    timings: StartTimings
    gate: WeightsGate
    weights: Weights
    loaded: Future[Loaded]


def load_leader(
    request: LoadModelRequest, settings: WorkerSettings, pool: LockedPool | None = None
) -> LoadedModel:
    """Return the engine of rank 0, with all ranks met; weights may still be arriving, at any of them.

    Args:
        request: What to load, and which rank of it.
        settings: Of this worker.
        pool: The store's memory, page-locked when the worker was pre-started.

    Raises:
        InvalidRequest: The spec asks for an engine, a dtype or adapters that ranks don't have.
        CheckpointInvalid: The checkpoint is damaged, is cut for another number of ranks, or of an
            architecture that this engine can't run in ranks.
        PeerError: There is no store, or the other ranks did not come.
        StokerError: As `services.worker.load.load_model`.
    """
    group = request.group
    sender = OrderSender(Path(group.socket))  # before the ranks meet: the others find it afterwards
    loaded = _load(request, settings, pool)
    sender.accept(group.ranks - 1)
    Path(group.store_file).unlink(missing_ok=True)
    return LoadedModel(
        engine=_leading_engine(request, settings, loaded, sender),
        timings=loaded.timings,
        gate=loaded.gate,
        needs_stages=loaded.needs_stages,
        weights=loaded.weights,
        loaded=loaded.arrived,
        adapters=AdapterCache(loaded.model, max_count=1, max_bytes=1, attach=_refuse_adapter),
    )


def load_follower(
    request: LoadModelRequest, settings: WorkerSettings, pool: LockedPool | None = None
) -> LoadedFollower:
    """Return another rank, ready to follow; as `load_leader`."""
    loaded = _load(request, settings, pool)
    follower = Follower(
        loaded.model,
        engine=ENGINE,
        ranks=request.group.ranks,
        prefill_chunk_tokens=EngineLimits().prefill_chunk_tokens,
    )
    return LoadedFollower(
        follower=follower,
        orders=OrderReader(Path(request.group.socket)),
        timings=loaded.timings,
        gate=loaded.gate,
        weights=loaded.weights,
        loaded=loaded.arrived,
    )


def _refuse(request: LoadModelRequest) -> None:
    spec = request.spec
    if spec.engine not in ("", ENGINE):
        raise InvalidRequest(f"model {spec.name}: this worker has the engine {ENGINE!r}, not {spec.engine!r}")
    if spec.adapters:
        raise InvalidRequest(
            f"model {spec.name}: adapters are not added to tensor-parallel ranks; deploy them with a "
            "conversion without --tensor-parallel",
            param="adapters",
        )


def _refuse_adapter(wanted: AdapterSpec) -> NoReturn:
    raise InvalidRequest(f"adapter {wanted.name} can't be added to tensor-parallel ranks", param="model")


def _check_cut(attachment: Attachment, ranks: int) -> None:
    found = attachment.checkpoint.tensor_parallel
    if found != ranks:
        raise CheckpointInvalid(
            f"{attachment.checkpoint.uri} is cut for {found or 1} ranks, not for the {ranks} of this "
            "replica; deploy the model again"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _LoadedPieces:
    """One rank's model, and what its load cost."""

    model: nn.Module
    device: torch.device
    revision: str
    timings: StartTimings
    gate: WeightsGate
    needs_stages: int
    weights: Weights
    arrived: Future[Loaded]


def _load(request: LoadModelRequest, settings: WorkerSettings, pool: LockedPool | None) -> _LoadedPieces:
    spec, group = request.spec, request.group
    _refuse(request)
    device = device_of(request.devices)
    timings = StartTimings()
    began = time.monotonic()
    attachment = attach(
        request.attach_socket,
        spec.checkpoint_uri,
        revision=request.revision,
        rank=group.rank,
        holder=f"{settings.worker_id} {request.replica_id} rank {group.rank}",
    )
    timings.attach_seconds = time.monotonic() - began
    _check_cut(attachment, group.ranks)
    refuse_what_cannot_fit(spec, attachment.checkpoint, device, ranks=group.ranks)
    order = arrival_order(attachment.tensors.values(), files=attachment.file_count)
    gate = WeightsGate(order.stages, is_interruptible=False)
    weights = weights_for(attachment, order, device=device, dtype=dtype_named(spec.dtype), pool=pool)
    arrival = Arrival(attachment, order, weights, gate)
    arrival.start()
    began = time.monotonic()
    skeleton = build_skeleton(config_of(attachment), device=device)
    meeting = RankMeeting(group.rank, group.ranks, store_file=Path(group.store_file), device=device)
    cut_skeleton(skeleton, meeting)
    timings.skeleton_seconds = time.monotonic() - began
    if not settings.execute_while_loading:
        arrival.loaded.result()
    began = time.monotonic()
    model = assign_weights(skeleton, weights.tensors, before_reading=arrival.loaded.result)
    add_biases_once(model, group.rank)
    needs_stages = wait_for_weights(model, weights.tensors, order.stage_of, gate, weights.join)
    timings.assign_seconds = time.monotonic() - began
    return _LoadedPieces(
        model=model,
        device=device,
        revision=attachment.checkpoint.revision,
        timings=timings,
        gate=gate,
        needs_stages=needs_stages,
        weights=weights,
        arrived=arrival.loaded,
    )


def _leading_engine(
    request: LoadModelRequest, settings: WorkerSettings, loaded: _LoadedPieces, sender: OrderSender
) -> TransformersEngine:
    ranks = request.group.ranks
    runner = LeadingRunner(loaded.model, None, sender, ranks)
    limits = limits_for(
        request,
        settings,
        loaded.model,
        loaded.device,
        ranks=ranks,
        deals_out_heads=deals_out_heads(loaded.model),
    )
    engine = TransformersEngine(loaded.model, limits, revision=loaded.revision, runner=runner)
    runner.begin(engine.numerics, engine.kv_budget)
    return engine
