"""`stoker.load_adapter`: a LoRA adapter put on a loaded model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from stoker.checkpoint.adapter import open_adapter, plan_of
from stoker.checkpoint.layout import ADAPTER_CONFIG_NAME
from stoker.checkpoint.torch_views import shaped
from stoker.errors import CheckpointInvalid, InvalidRequest, PeerError
from stoker.loader.daemon import AUTO, find_socket
from stoker.loader.file_memory import load_files
from stoker.loader.sources import local_folder
from stoker.models.lora import Adapters, adapters_of, fitted

if TYPE_CHECKING:
    from stoker.attach import Attachment
    from stoker.checkpoint.adapter import Adapter, LoraPlan
    from stoker.models.lora import LoraWeights


def load_adapter(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    activate: bool = True,
    daemon: str | os.PathLike[str] | None = AUTO,
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
        path: A folder in PEFT's format, or the uri of one that the store daemon fetches.
        name: What it is called from now on; None = the folder's name.
        activate: Whether it changes outputs at once.
        daemon: As for `load_model`; asked only for what is no folder of this host.

    Raises:
        NotFound: There is no such folder.
        CheckpointInvalid: It is damaged, for another model, or not supported (DoRA, biases, …).
        AlreadyExists: The model has an adapter of this name.
        InvalidRequest: The name is empty.
        LoadFailed: Its bytes did not come.
        PeerError: A daemon is needed, and none answers.
    """
    if name is not None and not name:
        raise InvalidRequest("an adapter's name cannot be empty", param="name")
    folder = local_folder(path)
    if folder is None:
        weights = _far_weights(model, os.fspath(path), daemon)
        found_name = os.fspath(path).rstrip("/").rpartition("/")[2]
    else:
        adapter = open_adapter(folder)
        weights, found_name = fitted(model, adapter, adapter_tensors(adapter)), adapter.path.name
    adapters = adapters_of(model)
    chosen = name or found_name
    adapters.add(chosen, weights)
    if activate:
        adapters.activate(chosen)
    return adapters


def attached_plan(attachment: Attachment) -> LoraPlan:
    """Return what an attached adapter does; its bytes may still be arriving.

    Raises:
        CheckpointInvalid: It is a whole model, or of a kind that is not supported.
    """
    location = attachment.checkpoint.uri
    config = attachment.small_files.get(ADAPTER_CONFIG_NAME)
    if config is None:
        raise CheckpointInvalid(f"{location} holds no adapter: there is no {ADAPTER_CONFIG_NAME}")
    return plan_of(config, attachment.tensors, location=location)


def attached_tensors(attachment: Attachment) -> dict[str, torch.Tensor]:
    """Return an attached adapter's tensors, copied: they outlive the attachment. Blocks until they are there.

    Raises:
        LoadFailed: They did not come.
    """
    from stoker.attach.tensors import tensors  # noqa: PLC0415 - imports grpc's messages: only who asks pays

    attachment.wait_all()
    return {name: tensor.clone() for name, tensor in tensors(attachment).items()}


def _far_weights(
    model: torch.nn.Module, uri: str, daemon: str | os.PathLike[str] | None
) -> dict[str, LoraWeights]:
    socket = find_socket(daemon)
    if socket is None:
        raise PeerError(
            f"{uri} is no folder of this host: only a store daemon can fetch it; start one (`stoker up`) and "
            "pass daemon=<its attach socket>"
        )
    from stoker.attach import attach  # noqa: PLC0415 - as above

    with attach(socket, uri, holder=f"library {os.getpid()}") as attachment:
        return fitted(model, attached_plan(attachment), attached_tensors(attachment))


def adapter_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors on the CPU, by their names in the file, copied; blocks.

    They are small, and used for as long as the base is: a mapped file that is written to would change them.

    Raises:
        LoadFailed: The file is gone, was cut or changed, or the disk can't read it.
    """
    memory = load_files([adapter.file])[0]
    raw = torch.frombuffer(memory.data, dtype=torch.uint8)
    start = adapter.file.data_start
    return {
        name: shaped(
            raw[start + entry.begin : start + entry.end], dtype=entry.dtype, shape=entry.shape, name=name
        ).clone()
        for name, entry in adapter.entries.items()
    }
