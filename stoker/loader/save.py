"""`stoker.save_model`: a model, or named tensors, written in the layout."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from stoker.checkpoint import manifest, staging
from stoker.checkpoint.content import plan_content
from stoker.checkpoint.index import CheckpointIndex, open_checkpoint
from stoker.checkpoint.layout import CONFIG_NAME, MANIFEST_NAME
from stoker.checkpoint.publish import publish
from stoker.checkpoint.tensor_bytes import planned, slices
from stoker.checkpoint.tensor_source import TensorSource
from stoker.errors import AlreadyExists, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from transformers import PreTrainedModel


def save_model(
    model: PreTrainedModel | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointIndex:
    """Write a model to a folder in the layout and return its index; blocks.

    What comes out is a safetensors checkpoint with its tensors aligned, in execution order and with digests:
    `load_model`, a store daemon and `from_pretrained` all open it. It appears whole or not at all. Tensors
    are written slice by slice; one that is not on the CPU is copied there, one at a time.

    Example:
        stoker.save_model(model, "my-model")
        tokenizer.save_pretrained("my-model")

    Args:
        model: A transformers model, or tensors by name (as a state dict; tied names once or each).
        path: A folder to create.
        config: Content of `config.json` for tensors by name; without one only tensors can be loaded again.
        overwrite: Whether a checkpoint in this layout at `path` may be replaced; nothing else ever is.
        progress: Called often with the bytes written and the bytes to write.

    Raises:
        AlreadyExists: Something is at `path`.
        DiskFull: There is not enough space; the message says how much is needed.
        InvalidRequest: `path` cannot be written, or an argument is of the wrong kind.
        CheckpointInvalid: safetensors has no such dtype, or a tensor has no data.
    """
    source = _source_of(model, config)
    destination = Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - a link stays a link
    staging.check_destination(destination)
    if os.path.lexists(destination) and not _may_be_replaced(destination, overwrite=overwrite):
        raise AlreadyExists(
            f"{destination} exists; choose another name"
            + ("." if overwrite else ", or pass overwrite=True where it holds a checkpoint in this layout.")
        )
    with staging.refusals_named(destination, need_bytes=0):
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging.remove_leftovers(destination)
    publish(
        source,
        plan_content(source, where="the model"),
        destination,
        origin=manifest.Source(
            uri="stoker.save_model", format="memory", fingerprint=secrets.token_hex(16), dtype=None
        ),
        replace=overwrite,
        progress=progress,
    )
    return open_checkpoint(destination)


class MemorySource(TensorSource):
    """Tensors in memory, by name; names that are one tensor are a group."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], small: dict[str, bytes]) -> None:
        self._tensors = tensors
        self._small = small
        self.tensors = planned(tensors)
        self.tied_groups: tuple[tuple[str, ...], ...] = ()
        places: dict[tuple[int, torch.Size, tuple[int, ...]], list[str]] = {}
        for name, tensor in tensors.items():
            places.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
        self.shared_groups = tuple(tuple(names) for names in places.values() if len(names) > 1)

    def read(self, name: str) -> Iterator[memoryview]:
        """Yield the tensor's bytes; one on another device is copied to the CPU first."""
        return slices(self._tensors[name].detach().cpu())

    def small_files(self) -> dict[str, bytes]:
        """Return the configs."""
        return self._small

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        pass


def _source_of(
    model: PreTrainedModel | Mapping[str, torch.Tensor], config: Mapping[str, Any] | None
) -> MemorySource:
    if isinstance(model, Mapping):
        text = json.dumps(dict(config or {}), indent=2).encode() + b"\n"
        return MemorySource(_checked(model), {CONFIG_NAME: text})
    if config is not None:
        raise InvalidRequest("config is for tensors by name; a model brings its own", param="config")
    from stoker.models.saved_state import saved_configs, saved_state  # noqa: PLC0415 - imports transformers

    return MemorySource(_checked(saved_state(model)), saved_configs(model))


def _checked(tensors: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    if not tensors:
        raise InvalidRequest("there are no tensors to save: give a model, or tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise InvalidRequest(f"{name!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.is_meta:
            raise InvalidRequest(f"{name!r} is on the meta device: it has no data to save")
        if tensor.layout is not torch.strided:
            raise InvalidRequest(f"{name!r} is {tensor.layout}; safetensors stores dense tensors only")
    return tensors


def _may_be_replaced(destination: Path, *, overwrite: bool) -> bool:
    if destination.is_dir() and not any(destination.iterdir()):
        return True
    return overwrite and (destination / MANIFEST_NAME).is_file()
