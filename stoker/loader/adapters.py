"""`stoker.load_adapter`: a LoRA adapter put on a loaded model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stoker.checkpoint.adapter import open_adapter
from stoker.checkpoint.torch_views import shaped
from stoker.errors import InvalidRequest
from stoker.loader.file_memory import load_files
from stoker.models.lora import Adapters, adapters_of, fitted

if TYPE_CHECKING:
    from stoker.checkpoint.adapter import Adapter


def load_adapter(
    model: torch.nn.Module, path: str | os.PathLike[str], name: str | None = None, *, activate: bool = True
) -> Adapters:
    """Attach a LoRA adapter to a loaded model and return all of the model's adapters.

    The base's weights are neither changed nor copied: an active adapter adds to the outputs of the modules
    it was trained for. Several can be attached to one base; one at most is active.

    Example:
        adapters = stoker.load_adapter(model, "my-lora", "poet")
        with adapters.using(None):          # the base as it is
            model.generate(...)

    Args:
        model: From `load_model`, or any other with the modules that the adapter names.
        path: A folder in PEFT's format.
        name: What it is called from now on; None = the folder's name.
        activate: Whether it changes outputs at once.

    Raises:
        NotFound: There is no such folder.
        CheckpointInvalid: It is damaged, for another model, or not supported (DoRA, biases, …).
        AlreadyExists: The model has an adapter of this name.
        InvalidRequest: The name is empty.
    """
    if name is not None and not name:
        raise InvalidRequest("an adapter's name cannot be empty", param="name")
    adapter = open_adapter(path)
    adapters = adapters_of(model)
    chosen = name or Path(adapter.path).name
    adapters.add(chosen, fitted(model, adapter, adapter_tensors(adapter)))
    if activate:
        adapters.activate(chosen)
    return adapters


def adapter_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors on the CPU, by their names in the file; blocks.

    Raises:
        LoadFailed: The file is gone, was cut or changed, or the disk can't read it.
    """
    memory = load_files([adapter.file])[0]
    raw = torch.frombuffer(memory.data, dtype=torch.uint8)
    start = adapter.file.data_start
    return {
        name: shaped(
            raw[start + entry.begin : start + entry.end], dtype=entry.dtype, shape=entry.shape, name=name
        )
        for name, entry in adapter.entries.items()
    }
