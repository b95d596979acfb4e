"""Load a model: attach to the store, build the skeleton while the store reads, put the tensors in.

Tensors are put in before their bytes are there: the engine takes sessions from then on, and its first passes
wait, module by module, for what has not arrived (`weights_gate`). Runs in a thread of its own; every step is
measured, and every failure names what is wrong with what.
"""

from __future__ import annotations

import functools
import json
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from services.worker.engine.adapter_cache import AdapterCache
from services.worker.engine.foreseen_products import start_proving
from services.worker.engine.forward import prefill_group_rows
from services.worker.engine.protocol import Engine, EngineLimits
from services.worker.engine.transformers_engine import TransformersEngine
from services.worker.kv.kv_budget import kv_bytes_per_token, max_kv_tokens
from services.worker.kv.kv_store import SLOT_TOKENS
from services.worker.memory import available_bytes, device_of, refuse_what_cannot_fit
from services.worker.model_loading import build_skeleton
from services.worker.settings import WorkerSettings
from services.worker.weights.arrival import Arrival
from services.worker.weights.arrival_order import ArrivalOrder, arrival_order
from services.worker.weights.cuda_copy import CudaCopyEngine
from services.worker.weights.device_weights import DeviceWeights
from services.worker.weights.host_copy import HostCopyEngine
from services.worker.weights.module_waits import wait_for_weights
from services.worker.weights.placed_weights import PlacedWeights
from services.worker.weights.pool_lock import LockedPool, lock_pool
from services.worker.weights.weights_gate import WeightsGate
from stoker import log
from stoker.attach import Attachment, Loaded, attach
from stoker.errors import CheckpointInvalid, InvalidRequest
from stoker.models.weights import assign_weights
from stoker.v1.model_pb2 import AdapterSpec
from stoker.v1.start_pb2 import StartTimings
from stoker.v1.worker_pb2 import LoadModelRequest

Weights = PlacedWeights | DeviceWeights

ADAPTER_ANSWER_SECONDS = 120.0
"""Until the store answers: it may ask a slow origin for the adapter's header first."""

ENGINE = "transformers"
CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """An engine that takes sessions, and what its load cost so far.

    Attributes:
        engine: Its passes wait at the gate for weights that are not there yet.
        timings: Of the stages that are over; `completed` adds the others.
        gate: Opens as weights arrive.
        needs_stages: How many of its stages must be open before there can be a token.
        weights: The model's tensors.
        loaded: Done when all weights are there, or will not come.
        adapters: What sessions may add to the model.
    """

    engine: Engine
    timings: StartTimings
    gate: WeightsGate
    needs_stages: int
    weights: Weights
    loaded: Future[Loaded]
    adapters: AdapterCache


def load_model(
    request: LoadModelRequest, settings: WorkerSettings, pool: LockedPool | None = None
) -> LoadedModel:
    """Return an engine that takes sessions; its weights may still be arriving.

    Blocks until the engine is made; until its weights are there, too, where they must be converted as a
    whole, or where the settings say so.

    Args:
        request: What to load, and where.
        settings: Of this worker.
        pool: The store's memory, page-locked when the worker was pre-started.

    Raises:
        InvalidRequest: The spec asks for an engine or dtype this worker doesn't have.
        CheckpointInvalid: The checkpoint is damaged, or of an architecture the engine can't run.
        DoesNotFit: Weights and cache are larger than the device.
        CapacityError: The pool or the device is held by others now.
        LoadFailed: The store could not bring the bytes.
        PeerError: There is no store.
    """
    spec = request.spec
    if spec.engine not in ("", ENGINE):
        raise InvalidRequest(f"model {spec.name}: this worker has the engine {ENGINE!r}, not {spec.engine!r}")
    dtype = dtype_named(spec.dtype)
    device = device_of(request.devices)
    timings = StartTimings()
    began = time.monotonic()
    attachment = attach(
        request.attach_socket,
        spec.checkpoint_uri,
        revision=request.revision,
        holder=f"{settings.worker_id} {request.replica_id}",
        window=True,
    )
    timings.attach_seconds = time.monotonic() - began
    refuse_what_cannot_fit(spec, attachment.checkpoint, device)
    order = arrival_order(attachment.tensors.values(), files=attachment.file_count)
    gate = WeightsGate(order.stages)
    weights = weights_for(attachment, order, device=device, dtype=dtype, pool=pool)
    arrival = Arrival(attachment, order, weights, gate)
    arrival.start()
    if device.type == "cpu":
        _foresee_products(attachment, weights)
    began = time.monotonic()
    skeleton = build_skeleton(config_of(attachment), device=device)
    timings.skeleton_seconds = time.monotonic() - began
    if not settings.execute_while_loading:
        arrival.loaded.result()
    began = time.monotonic()
    model = assign_weights(skeleton, weights.tensors, before_reading=arrival.loaded.result)
    needs_stages = wait_for_weights(model, weights.tensors, order.stage_of, gate, weights.join)
    engine = TransformersEngine(
        model, limits_for(request, settings, model, device), revision=attachment.checkpoint.revision
    )
    timings.assign_seconds = time.monotonic() - began
    return LoadedModel(
        engine=engine,
        timings=timings,
        gate=gate,
        needs_stages=needs_stages,
        weights=weights,
        loaded=arrival.loaded,
        adapters=AdapterCache(
            model,
            max_count=settings.max_adapters,
            max_bytes=settings.max_adapter_bytes,
            attach=functools.partial(attach_adapter, request.attach_socket, settings.worker_id),
        ),
    )


def _foresee_products(attachment: Attachment, weights: Weights) -> None:
    """Have the products of a short prompt proven beside the building of the model."""
    in_layers = [name for name, tensor in attachment.tensors.items() if tensor.layer is not None]
    start_proving(weights.tensors, in_layers, group_rows=prefill_group_rows())


def attach_adapter(socket: str, holder: str, wanted: AdapterSpec) -> Attachment:
    """Ask the store for an adapter, in the revision that was deployed; raises as `attach`."""
    return attach(
        socket,
        wanted.uri,
        revision=wanted.revision,
        holder=f"{holder} adapter {wanted.name}",
        timeout_seconds=ADAPTER_ANSWER_SECONDS,
    )


def weights_for(
    attachment: Attachment,
    order: ArrivalOrder,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    pool: LockedPool | None = None,
) -> Weights:
    """Return where a checkpoint's tensors shall be.

    Raises:
        DoesNotFit: There is no room.
    """
    if device.type == "cpu" and attachment.window_bytes is None:
        return PlacedWeights(attachment, order, dtype=dtype)
    if device.type == "cpu":
        return DeviceWeights(attachment, order, HostCopyEngine(), dtype=dtype)
    engine = CudaCopyEngine(device, locked=() if pool is None else pool.ranges)
    return DeviceWeights(attachment, order, engine, dtype=dtype, pool=pool)


def lock_pool_for_devices(settings: WorkerSettings) -> LockedPool | None:
    """Page-lock the store's pool where this host has a CUDA device and the settings name a store."""
    if settings.attach_socket is None or not torch.cuda.is_available():
        return None
    try:
        engine = CudaCopyEngine(torch.device("cuda", settings.lock_device))
    except RuntimeError as error:  # no such device, or it has no room for a context
        log.get().warning("pool.not_locked", reason=str(error), action="loads go through page-locked buffers")
        return None
    return lock_pool(settings.attach_socket, engine)


class Load(Protocol):
    """A load that was begun; see `LoadedModel`."""

    @property
    def timings(self) -> StartTimings:
        """Of the stages that are over."""
        ...

    @property
    def gate(self) -> WeightsGate:
        """Opens as weights arrive."""
        ...

    @property
    def weights(self) -> Weights:
        """The tensors."""
        ...

    @property
    def loaded(self) -> Future[Loaded]:
        """Done when all weights are there, or will not come."""
        ...


def completed(model: Load) -> StartTimings:
    """Return the timings of a load all of whose weights are there.

    Raises:
        StokerError: They will not come: why.
    """
    loaded = model.loaded.result()
    timings = StartTimings(
        weights_seconds=loaded.seconds,
        transfers=(*loaded.transfers, *model.weights.transfers),
        overlap_seconds=model.gate.overlap_seconds(),
        stall_seconds=model.gate.stall_seconds(),
    )
    timings.MergeFrom(model.timings)
    return timings


def limits_for(  # noqa: PLR0913 - what the bounds follow from
    request: LoadModelRequest,
    settings: WorkerSettings,
    model: Any,
    device: torch.device,
    *,
    ranks: int = 1,
    deals_out_heads: bool = True,
) -> EngineLimits:
    """Return the engine's bounds: the spec's where it names them, else this worker's defaults.

    Args:
        request: Has the spec; its cache is that of all ranks together.
        settings: Of this worker.
        model: Has its weights.
        device: This rank's.
        ranks: How many there are.
        deals_out_heads: Whether each of them keeps its own heads' keys and values; otherwise each keeps all.

    Raises:
        DoesNotFit: The cache has no room for a single token.
    """
    spec = request.spec
    dtype = next(model.parameters()).dtype
    per_token = kv_bytes_per_token(model.config, dtype) * (1 if deals_out_heads else ranks)
    cache_bytes = spec.kv_cache_bytes or (
        settings.default_kv_cache_bytes
        if device.type == "cpu"
        else int(available_bytes(device) * settings.default_cuda_kv_fraction) * ranks
    )
    tokens = max_kv_tokens(cache_bytes, per_token)
    max_batch = max(settings.max_batch, spec.concurrency)
    # Sessions whose keys and values lie in the pool decode together, others one by one. A default that the
    # longest session may fill alone leaves the pool nothing, so it comes on top, as large at most.
    slots = 0 if spec.kv_cache_bytes or device.type != "cpu" else min(max_batch, tokens // SLOT_TOKENS)
    return EngineLimits(
        max_batch=max_batch,
        max_waiting=settings.max_waiting,
        max_context_tokens=min(spec.max_context_tokens or tokens, tokens),
        max_kv_tokens=tokens + slots * SLOT_TOKENS,
    )


def dtype_named(name: str) -> torch.dtype | None:
    """Return the dtype to cast weights to; None = as stored.

    Raises:
        InvalidRequest: The engine computes in no such dtype.
    """
    if name in ("", "auto"):
        return None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InvalidRequest(f"dtype {name!r} is not one of auto, {', '.join(known)}", param="dtype")
    return known[name]


def config_of(attachment: Attachment) -> dict[str, Any]:
    """Return what a checkpoint's `config.json` says.

    Raises:
        CheckpointInvalid: It has none, or not an object of JSON.
    """
    content = attachment.small_files.get(CONFIG_FILE)
    uri = attachment.checkpoint.uri
    if content is None:
        raise CheckpointInvalid(f"{uri} has no {CONFIG_FILE}: it is needed to build the model")
    try:
        config = json.loads(content)
    except ValueError as error:
        raise CheckpointInvalid(f"{uri}/{CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointInvalid(f"{uri}/{CONFIG_FILE} is not a JSON object")
    return config
