"""Load a model: attach to the store, build the skeleton while the store reads, put the tensors in.

Runs in a thread of its own; every step is measured, and every failure names what is wrong with what.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from services.worker.engine import Engine, EngineLimits
from services.worker.kv_budget import kv_bytes_per_token, max_kv_tokens
from services.worker.memory import available_bytes, device_of, refuse_what_cannot_fit
from services.worker.model_loading import build_skeleton
from services.worker.settings import WorkerSettings
from services.worker.transformers_engine import TransformersEngine
from stoker.attach import Attachment, Loaded, attach
from stoker.attach.tensors import tensors
from stoker.errors import CheckpointInvalid, DoesNotFit, InvalidRequest
from stoker.models.skeleton import Skeleton
from stoker.models.weights import assign_weights
from stoker.v1.start_pb2 import StartTimings
from stoker.v1.worker_pb2 import LoadModelRequest

ENGINE = "transformers"
CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """An engine that can serve, and what its load cost."""

    engine: Engine
    timings: StartTimings


def load_model(request: LoadModelRequest, settings: WorkerSettings) -> LoadedModel:
    """Return an engine that serves the model. Blocks until its weights are there.

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
    )
    timings.attach_seconds = time.monotonic() - began
    refuse_what_cannot_fit(spec, attachment.checkpoint, device)
    with ThreadPoolExecutor(1, "stoker-weights") as receiver:
        receiving = receiver.submit(_receive, attachment, device)
        began = time.monotonic()
        skeleton = build_skeleton(_config(attachment), device=device)
        timings.skeleton_seconds = time.monotonic() - began
        loaded = receiving.result()
    timings.weights_seconds = loaded.seconds
    timings.transfers.extend(loaded.transfers)
    began = time.monotonic()
    model = _assign(skeleton, attachment, device, dtype)
    engine = TransformersEngine(model, limits_for(request, settings, model, device))
    timings.assign_seconds = time.monotonic() - began
    return LoadedModel(engine=engine, timings=timings)


def limits_for(
    request: LoadModelRequest, settings: WorkerSettings, model: Any, device: torch.device
) -> EngineLimits:
    """Return the engine's bounds: the spec's where it names them, else this worker's defaults.

    Raises:
        DoesNotFit: The cache has no room for a single token.
    """
    spec = request.spec
    dtype = next(model.parameters()).dtype
    per_token = kv_bytes_per_token(model.config, dtype)
    cache_bytes = spec.kv_cache_bytes or (
        settings.default_kv_cache_bytes
        if device.type == "cpu"
        else int(available_bytes(device) * settings.default_cuda_kv_fraction)
    )
    tokens = max_kv_tokens(cache_bytes, per_token)
    return EngineLimits(
        max_batch=max(settings.max_batch, spec.concurrency),
        max_waiting=settings.max_waiting,
        max_context_tokens=min(spec.max_context_tokens or tokens, tokens),
        max_kv_tokens=tokens,
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


def _receive(attachment: Attachment, device: torch.device) -> Loaded:
    loaded = attachment.wait_all()
    if device.type == "cpu":
        for file in range(attachment.file_count):
            attachment.map_pages(file)
    return loaded


def _config(attachment: Attachment) -> dict[str, Any]:
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


def _assign(
    skeleton: Skeleton, attachment: Attachment, device: torch.device, dtype: torch.dtype | None
) -> torch.nn.Module:
    named = tensors(attachment)
    try:
        if device.type != "cpu" or dtype is not None:
            named = _moved(named, device, dtype)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(f"{attachment.checkpoint.uri} does not fit on {device}: {error}") from error
    return assign_weights(skeleton, named)


def _moved(
    named: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return copies on the device and in the dtype; names that share a tensor share its copy."""
    copies: dict[int, torch.Tensor] = {}
    for tensor in named.values():
        if id(tensor) not in copies:
            wanted = dtype if tensor.is_floating_point() else None
            copies[id(tensor)] = tensor.to(device=device, dtype=wanted)
    return {name: copies[id(tensor)] for name, tensor in named.items()}
