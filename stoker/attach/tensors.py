"""torch tensors that are the store's memory: no byte is copied, every replica on the host shares them.

A tensor holds its mapping and with it the lease. Writing to a tensor in place copies the pages it touches for
this process only.
"""

from __future__ import annotations

import torch

from stoker.attach.attachment import Attachment, Tensor
from stoker.checkpoint.dtypes import TORCH_NAMES
from stoker.errors import CheckpointInvalid

_PACKED = {"F4": 2}
"""Elements per item of torch's type, where that is not one."""


def tensor(attachment: Attachment, name: str) -> torch.Tensor:
    """Return a stored tensor; its content is there once `attachment.wait_tensor(name)` has returned.

    A tensor that starts where its elements may not (possible in place, never in a converted checkpoint) is
    waited for and copied.

    Raises:
        CheckpointInvalid: torch has no such dtype.
        LoadFailed: A tensor that must be copied did not arrive.
    """
    place = attachment.tensors[name]
    dtype = _torch_dtype(place)
    shape = _torch_shape(place)
    if place.nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    raw = _bytes(attachment.buffer(place.file, place.offset, place.nbytes))
    if place.offset % dtype.itemsize:
        attachment.wait_tensor(name)
        raw = raw.clone()
    return raw.view(dtype).reshape(shape)


def tensors(attachment: Attachment) -> dict[str, torch.Tensor]:
    """Return every tensor by name, tied names included (they share one tensor object)."""
    found = {name: tensor(attachment, name) for name in attachment.tensors}
    for stored, *others in attachment.tied:
        found.update(dict.fromkeys(others, found[stored]))
    return found


def _bytes(buffer: memoryview) -> torch.Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _torch_dtype(place: Tensor) -> torch.dtype:
    dtype = getattr(torch, TORCH_NAMES.get(place.dtype, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointInvalid(
            f"tensor {place.name!r} is {place.dtype}, which torch {torch.__version__} does not have; "
            "convert the checkpoint to another dtype"
        )
    return dtype


def _torch_shape(place: Tensor) -> tuple[int, ...]:
    items = _PACKED.get(place.dtype, 1)
    if items == 1:
        return place.shape
    if not place.shape or place.shape[-1] % items:
        raise CheckpointInvalid(
            f"tensor {place.name!r}: {place.dtype} {list(place.shape)} does not pack by {items} along its "
            "last dimension, as torch needs"
        )
    return (*place.shape[:-1], place.shape[-1] // items)
