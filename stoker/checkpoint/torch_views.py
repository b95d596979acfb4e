"""Stored bytes seen as the torch tensors that they are, without a copy. Imports torch."""

from __future__ import annotations

import torch

from stoker.checkpoint.dtypes import TORCH_NAMES
from stoker.errors import CheckpointInvalid

_DTYPES = {
    stored: getattr(torch, name)
    for stored, name in TORCH_NAMES.items()
    if isinstance(getattr(torch, name, None), torch.dtype)
}
_PACKED = {"F4": 2}
"""Elements per item of torch's type, where that is not one."""


def torch_dtype(dtype: str, *, name: str) -> torch.dtype:
    """Return torch's dtype for a safetensors dtype.

    Args:
        dtype: safetensors' name, e.g. `BF16`.
        name: Of the tensor, for messages.

    Raises:
        CheckpointInvalid: torch has no such dtype.
    """
    found: torch.dtype | None = _DTYPES.get(dtype)
    if found is None:
        raise CheckpointInvalid(
            f"tensor {name!r} is {dtype}, which torch {torch.__version__} does not have; "
            "convert the checkpoint to another dtype"
        )
    return found


def torch_shape(dtype: str, shape: tuple[int, ...], *, name: str) -> tuple[int, ...]:
    """Return the shape that torch counts: 4-bit floats come in pairs.

    Raises:
        CheckpointInvalid: The last dimension doesn't hold whole pairs.
    """
    items = _PACKED.get(dtype, 1)
    if items == 1:
        return shape
    if not shape or shape[-1] % items:
        raise CheckpointInvalid(
            f"tensor {name!r}: {dtype} {list(shape)} does not pack by {items} along its "
            "last dimension, as torch needs"
        )
    return (*shape[:-1], shape[-1] // items)


def shaped(raw: torch.Tensor, *, dtype: str, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """Return a flat U8 tensor as what it holds; copied only where it starts inside an element.

    Args:
        raw: The tensor's bytes, all of them there.
        dtype: safetensors' name.
        shape: Element counts.
        name: Of the tensor, for messages.

    Raises:
        CheckpointInvalid: torch has no such dtype or cannot pack the shape.
    """
    wanted = torch_dtype(dtype, name=name)
    extents = torch_shape(dtype, shape, name=name)
    if not raw.numel():
        return torch.empty(extents, dtype=wanted, device=raw.device)
    misplaced = raw.storage_offset() % wanted.itemsize or raw.data_ptr() % wanted.itemsize
    return (raw.clone() if misplaced else raw).view(wanted).reshape(extents)
