"""`models.yaml`: the models that should be deployed, checked as far as a file can be without a cluster. Pure.

    defaults:               # what a model below does not say
      keep_alive_seconds: 600
    models:
      - name: chat
        checkpoint_uri: /models/chat    # a relative path is relative to the file
        min_replicas: 1

Keys are the fields of `ModelSpec` (model.proto), as in the REST API. A default is replaced whole, not merged.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from stoker.cli import yaml_lines
from stoker.cli.yaml_lines import Document, read_yaml
from stoker.errors import InvalidRequest
from stoker.v1 import model_pb2

MAX_ERRORS = 20
"""Complaints shown at once; the rest are counted."""
LEAST_BEGINNING = 3
"""Letters of an unknown key, from which on keys that begin with it are named."""
MAX_MODELS = 10_000
LABELS = Field(default=None, max_length=32)

Labels = dict[
    Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")],
    Annotated[str, Field(max_length=256)],
]
Uri = Annotated[str, Field(min_length=1, max_length=4096)]


class _Strict(BaseModel):
    """Nothing unknown, nothing converted: `no` is not a name and "8" not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, frozen=True)


class Defaults(_Strict):
    """What holds for every model that does not say otherwise; unset = the controller's defaults."""

    keep_alive_seconds: float | None = Field(default=None, le=30 * 24 * 3600, allow_inf_nan=False)
    """How long an unused replica lives, in seconds; 0 = stop at once, negative = for ever."""
    keep_alive_auto: bool | None = None
    """Choose the keep-alive from the model's own arrivals; keep_alive_seconds is then the longest."""
    min_replicas: int | None = Field(default=None, ge=0, le=1000)
    """Replicas kept even when nobody asks; 0 = scale to zero."""
    max_replicas: int | None = Field(default=None, ge=1, le=1000)
    """Replicas at most."""
    concurrency: int | None = Field(default=None, ge=1, le=4096)
    """Sessions per replica before another replica is wanted."""
    max_queue: int | None = Field(default=None, ge=1, le=100_000)
    """Requests that may wait for the model in one gateway."""
    engine: Literal["transformers"] | None = None
    """What runs it."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = None
    """Type of the weights on the device; auto = as stored."""
    kv_cache_bytes: int | None = Field(default=None, ge=0, le=1 << 44)
    """Key/value cache of one replica, in bytes; 0 = the engine's default."""
    max_context_tokens: int | None = Field(default=None, ge=0, le=100_000_000)
    """Prompt and output of one session; 0 = the model's own limit."""
    labels: Labels | None = LABELS
    """For the owner; not interpreted."""
    devices: int | None = Field(default=None, ge=1, le=64)
    """Device slots of one node that a replica occupies: as many as its checkpoint is cut for."""
    pinned: bool | None = None
    """Its replicas are never stopped or moved to make room for other models."""
    required_node_labels: Labels | None = LABELS
    """Only nodes that carry all of these take it."""
    preferred_node_labels: Labels | None = LABELS
    """Of two nodes about equally fast, the one with more of these."""
    resume: Literal["exact", "fast"] | None = None
    """How a session goes on after a crash: exact = bit for bit, fast = sooner."""


class AdapterEntry(_Strict):
    """A LoRA adapter that requests may choose as `model:name`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """What clients add to the model's name after a colon."""
    uri: str = Field(min_length=1, max_length=1024)
    """Folder of the adapter, in PEFT's format, that every node can see, or a URI that stores fetch."""


class ModelEntry(Defaults):
    """A model that should be deployed."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")
    """What clients ask for."""
    checkpoint_uri: Uri
    """Folder that every node can see, or a URI; a relative path is relative to the file."""
    adapters: list[AdapterEntry] | None = Field(default=None, max_length=256)
    """LoRA adapters that requests may choose."""


class ModelFile(_Strict):
    """The models that should be deployed: `stoker deploy -f FILE`."""

    defaults: Defaults = Defaults()
    """What a model does not say itself."""
    models: list[ModelEntry] = Field(min_length=1, max_length=MAX_MODELS)
    """One entry per model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A model that a file wants deployed, and where it says so (`file:line`)."""

    spec: model_pb2.ModelSpec
    where: str


def read_models(path: Path) -> tuple[Wanted, ...]:
    """Read the models that a file wants deployed.

    Raises:
        InvalidRequest: The file can't be read, or says what can't be; every complaint names line and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest(f"{path} can't be read: {reason}") from error
    return parse_models(text, str(path), path.resolve().parent)


def parse_models(text: str, source: str, folder: Path) -> tuple[Wanted, ...]:
    """Return the models that a text wants deployed; see `read_models`.

    Args:
        text: YAML.
        source: Name of the file, for messages.
        folder: What relative paths are relative to.
    """
    document = read_yaml(text, source)
    if not isinstance(document.value, dict):
        raise InvalidRequest(f"{source}:1: this is not a mapping with `models:`; see `stoker schema`")
    try:
        file = ModelFile.model_validate(document.value)
    except ValidationError as error:
        raise InvalidRequest(_complaints(error.errors(), document)) from error
    first: dict[str, str] = {}
    wanted = []
    for at, entry in enumerate(file.models):
        where = document.where(("models", at))
        if entry.name in first:
            raise InvalidRequest(f"{where}: model {entry.name} stands in {first[entry.name]} already")
        first[entry.name] = where
        wanted.append(Wanted(spec=_spec(file.defaults, entry, folder), where=where))
    return tuple(wanted)


def schema_text() -> str:
    """Return the JSON schema of the file, as it is shipped in `models.schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **ModelFile.model_json_schema()}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def _spec(defaults: Defaults, entry: ModelEntry, folder: Path) -> model_pb2.ModelSpec:
    fields: dict[str, Any] = {
        **defaults.model_dump(exclude_none=True),
        **entry.model_dump(exclude_none=True),
    }
    fields["checkpoint_uri"] = _absolute(entry.checkpoint_uri, folder)
    for adapter in fields.get("adapters", ()):
        adapter["uri"] = _absolute(adapter["uri"], folder)
    return model_pb2.ModelSpec(**fields)


def _absolute(uri: str, folder: Path) -> str:
    return uri if "://" in uri else str((folder / Path(uri).expanduser()).absolute())


def _complaints(errors: Sequence[ErrorDetails], document: Document) -> str:
    lines = [_complaint(error, document) for error in errors[:MAX_ERRORS]]
    if len(errors) > MAX_ERRORS:
        lines.append(f"and {len(errors) - MAX_ERRORS} more")
    return "\n".join(lines)


def _complaint(error: ErrorDetails, document: Document) -> str:
    path: yaml_lines.Path = error["loc"]
    field = _dotted(path)
    where = document.where(path)
    if error["type"] == "extra_forbidden":
        known = sorted(_keys_of(path[:-1]))
        near = _near(str(path[-1]), known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
        return f"{where}: {field}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: {field}: this is missing"
    problem = error["msg"].removeprefix("Input ")
    quotes = "; put it in quotes" if error["type"] == "string_type" and _is_scalar(error["input"]) else ""
    return f"{where}: {field}: {_short(error['input'])} {problem}{quotes}"


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Return what may have been meant: what begins like it, as options of `deploy` do, or is most alike."""
    begun = [key for key in known if len(name) >= LEAST_BEGINNING and key.startswith(name)]
    return begun or difflib.get_close_matches(name, known, n=1)


def _keys_of(path: yaml_lines.Path) -> set[str]:
    """Return the keys that may stand where `path` leads."""
    found: type[BaseModel] = ModelFile
    if path:
        found = Defaults if path[0] == "defaults" else AdapterEntry if "adapters" in path else ModelEntry
    return set(found.model_fields)


def _dotted(path: yaml_lines.Path) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".").replace(".[key]", "")


def _is_scalar(value: object) -> bool:
    return value is not None and not isinstance(value, (dict, list))


def _short(value: object, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
