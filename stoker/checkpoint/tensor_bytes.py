"""torch tensors as the bytes, dtypes and shapes that safetensors stores; and casts, slice by slice.

Imports torch: load this module only where a conversion needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stoker.checkpoint.dtypes import DTYPE_BITS, TORCH_NAMES
from stoker.checkpoint.plan import PlannedTensor
from stoker.checkpoint.tensor_source import SLICE_BYTES
from stoker.errors import CheckpointInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_TO_TORCH: dict[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, attribute in TORCH_NAMES.items() if hasattr(torch, attribute)
}
_FROM_TORCH = {dtype: name for name, dtype in _TO_TORCH.items()}


def safetensors_dtype(tensor: torch.Tensor, *, name: str) -> str:
    """Return the tensor's dtype as safetensors calls it.

    Raises:
        CheckpointInvalid: Safetensors has no such dtype.
    """
    found = _FROM_TORCH.get(tensor.dtype)
    if found is None:
        raise CheckpointInvalid(
            f"Tensor {name!r} has the dtype {tensor.dtype}, which safetensors cannot store; "
            "cast it before saving."
        )
    return found


def safetensors_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape in elements; torch counts 4-bit floats in pairs."""
    shape = tuple(tensor.shape)
    if _FROM_TORCH.get(tensor.dtype) == "F4" and shape:
        return (*shape[:-1], shape[-1] * 2)
    return (2,) if _FROM_TORCH.get(tensor.dtype) == "F4" else shape


def planned(tensors: Mapping[str, torch.Tensor]) -> dict[str, PlannedTensor]:
    """Return what of tensors in memory a conversion plans with.

    Raises:
        CheckpointInvalid: Safetensors has no such dtype.
    """
    return {
        name: PlannedTensor(
            name=name,
            dtype=safetensors_dtype(tensor, name=name),
            shape=safetensors_shape(tensor),
            nbytes=tensor.numel() * tensor.element_size(),
        )
        for name, tensor in tensors.items()
    }


def slices(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a CPU tensor in row-major order, at most `SLICE_BYTES` at a time."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for begin in range(0, flat.numel(), SLICE_BYTES):
        yield flat[begin : begin + SLICE_BYTES].numpy().data


def cast(parts: Iterable[memoryview], *, source: str, target: str) -> Iterator[memoryview]:
    """Yield `parts` of dtype `source` as dtype `target`, rounded as torch rounds.

    Args:
        parts: Writable buffers of whole elements.
        source: A key of `CASTABLE`.
        target: Likewise.
    """
    for part in parts:
        if part.nbytes % (DTYPE_BITS[source] // 8):
            raise AssertionError("a slice ends inside an element")
        values = torch.frombuffer(part, dtype=_TO_TORCH[source])
        yield from slices(values.to(_TO_TORCH[target]))
