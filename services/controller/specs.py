"""Is a model's description sound, and what do its unset numbers mean? Pure."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping

from services.controller.settings import ControllerSettings
from stoker.errors import CheckpointInvalid, InvalidRequest
from stoker.v1 import model_pb2

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
ENGINES = ("transformers",)
RESUMES = ("exact", "fast")
DTYPES = ("auto", "float32", "float16", "bfloat16")
MAX_KEEP_ALIVE_SECONDS = 30 * 24 * 3600.0
MAX_REPLICAS = 1_000
MAX_CONCURRENCY = 4_096
MAX_QUEUE = 100_000
MAX_URI_CHARACTERS = 4_096
MAX_LABELS = 32
LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
MAX_LABEL_CHARACTERS = 256
MAX_CONTEXT_TOKENS = 100_000_000
MAX_KV_CACHE_BYTES = 1 << 44
"""16 TiB: more than any host's memory."""
NEAR_ARCHITECTURES = 3


def resolve(spec: model_pb2.ModelSpec, settings: ControllerSettings) -> model_pb2.ModelSpec:
    """Return a copy of `spec` with the controller's defaults for what is unset.

    Raises:
        InvalidRequest: A field is missing or out of range; `param` names it.
    """
    full = model_pb2.ModelSpec()
    full.CopyFrom(spec)
    if not spec.HasField("keep_alive_seconds"):
        full.keep_alive_seconds = settings.keep_alive_seconds
    full.max_replicas = spec.max_replicas or max(settings.max_replicas, spec.min_replicas)
    full.concurrency = spec.concurrency or settings.concurrency
    full.max_queue = spec.max_queue or settings.max_queue
    full.engine = spec.engine or ENGINES[0]
    full.dtype = spec.dtype or DTYPES[0]
    full.resume = spec.resume or RESUMES[0]
    _check(full)
    return full


def on_devices(spec: model_pb2.ModelSpec, checkpoint: model_pb2.CheckpointInfo) -> model_pb2.ModelSpec:
    """Return a copy of `spec` with as many devices as its checkpoint has tensor-parallel ranks.

    Args:
        spec: Resolved; devices may be unset.
        checkpoint: What a store says of it.

    Raises:
        InvalidRequest: It asks for another number, or for what ranks don't have.
    """
    ranks = max(1, checkpoint.tensor_parallel)
    if spec.devices not in (0, ranks) and ranks == 1:
        raise InvalidRequest(
            f"model {spec.name}: devices is {spec.devices}, and checkpoint {checkpoint.uri} is in one piece: "
            f"cut it with `stoker convert --tensor-parallel {spec.devices} SRC DST` and deploy DST, or leave "
            "devices out",
            param="devices",
        )
    if spec.devices not in (0, ranks):
        raise InvalidRequest(
            f"model {spec.name}: devices is {spec.devices}, and checkpoint {checkpoint.uri} is cut for "
            f"{ranks} ranks, one device each; leave devices out, or convert the original with "
            f"--tensor-parallel {spec.devices}",
            param="devices",
        )
    if ranks > 1 and spec.adapters:
        raise InvalidRequest(
            f"model {spec.name}: adapters are not added to tensor-parallel ranks, and checkpoint "
            f"{checkpoint.uri} is cut for {ranks}; deploy them with a conversion without --tensor-parallel",
            param="adapters",
        )
    full = model_pb2.ModelSpec()
    full.CopyFrom(spec)
    full.devices = ranks
    return full


def check_architecture(checkpoint: model_pb2.CheckpointInfo, served: Collection[str]) -> None:
    """Refuse a checkpoint that no engine of the cluster serves; `served` empty = nobody said.

    Raises:
        CheckpointInvalid: Names the nearest architectures that are served.
    """
    if not served or checkpoint.architecture in served:
        return
    near = difflib.get_close_matches(checkpoint.architecture, served, n=NEAR_ARCHITECTURES, cutoff=0.3)
    hint = f"; near ones that are: {', '.join(near)}" if near else f"; served are {len(served)} others"
    raise CheckpointInvalid(
        f"checkpoint {checkpoint.uri} is of architecture {checkpoint.architecture or '(none stated)'}, which "
        f"no engine of this cluster serves{hint}",
        param="checkpoint_uri",
    )


def _check(spec: model_pb2.ModelSpec) -> None:
    if not NAME.fullmatch(spec.name):
        raise InvalidRequest(
            f"model name {spec.name[:140]!r} is not of the form {NAME.pattern}: letters, digits and . _ / -, "
            "beginning with a letter or digit",
            param="name",
        )
    if not spec.checkpoint_uri or len(spec.checkpoint_uri) > MAX_URI_CHARACTERS:
        raise InvalidRequest(
            f"model {spec.name}: checkpoint_uri must name a folder in {MAX_URI_CHARACTERS} characters",
            param="checkpoint_uri",
        )
    keep_alive_seconds = spec.keep_alive_seconds
    if not math.isfinite(keep_alive_seconds) or keep_alive_seconds > MAX_KEEP_ALIVE_SECONDS:
        raise InvalidRequest(
            f"model {spec.name}: keep_alive_seconds {keep_alive_seconds:g} is above "
            f"{MAX_KEEP_ALIVE_SECONDS:g}; use a negative number for ever",
            param="keep_alive_seconds",
        )
    if spec.keep_alive_auto and keep_alive_seconds == 0:
        raise InvalidRequest(
            f"model {spec.name}: keep_alive_auto chooses up to keep_alive_seconds, which is 0; give the "
            "longest it may be (negative = any)",
            param="keep_alive_seconds",
        )
    _check_range(spec, "max_replicas", spec.max_replicas, MAX_REPLICAS)
    _check_range(spec, "concurrency", spec.concurrency, MAX_CONCURRENCY)
    _check_range(spec, "max_queue", spec.max_queue, MAX_QUEUE)
    if spec.min_replicas > spec.max_replicas:
        raise InvalidRequest(
            f"model {spec.name}: min_replicas {spec.min_replicas} is above max_replicas {spec.max_replicas}",
            param="min_replicas",
        )
    _check_choice(spec, "engine", spec.engine, ENGINES)
    _check_choice(spec, "dtype", spec.dtype, DTYPES)
    _check_choice(spec, "resume", spec.resume, RESUMES)
    _check_most(spec, "max_context_tokens", spec.max_context_tokens, MAX_CONTEXT_TOKENS)
    _check_most(spec, "kv_cache_bytes", spec.kv_cache_bytes, MAX_KV_CACHE_BYTES)
    _check_labels(spec, "labels", spec.labels)
    _check_labels(spec, "required_node_labels", spec.required_node_labels)
    _check_labels(spec, "preferred_node_labels", spec.preferred_node_labels)


def _check_labels(spec: model_pb2.ModelSpec, field: str, labels: Mapping[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise InvalidRequest(
            f"model {spec.name}: {len(labels)} {field}, at most {MAX_LABELS} are kept", param=field
        )
    for key, value in sorted(labels.items()):
        if not LABEL_KEY.fullmatch(key):
            raise InvalidRequest(
                f"model {spec.name}: a key of {field}, {key[:140]!r}, is not of the form {LABEL_KEY.pattern}",
                param=field,
            )
        if len(value) > MAX_LABEL_CHARACTERS:
            raise InvalidRequest(
                f"model {spec.name}: {field} {key} has {len(value)} characters, at most "
                f"{MAX_LABEL_CHARACTERS} are kept",
                param=field,
            )


def _check_most(spec: model_pb2.ModelSpec, field: str, value: int, most: int) -> None:
    if value > most:
        raise InvalidRequest(f"model {spec.name}: {field} {value} is above {most}", param=field)


def _check_range(spec: model_pb2.ModelSpec, field: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise InvalidRequest(f"model {spec.name}: {field} {value} is not in 1 to {most}", param=field)


def _check_choice(spec: model_pb2.ModelSpec, field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidRequest(
            f"model {spec.name}: {field} {value!r} is none of {', '.join(known)}", param=field
        )
