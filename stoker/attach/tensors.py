"""torch tensors that are the store's memory: no byte is copied, every replica on the host shares them.

A tensor holds its mapping and with it the lease. Writing to a tensor in place copies the pages it touches for
this process only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import frombuffer

from stoker.attach.attachment import Attachment
from stoker.attach.columns import Tensor
from stoker.checkpoint.torch_views import shaped, torch_dtype, torch_shape


def tensor(attachment: Attachment, name: str) -> torch.Tensor:
    """Return a stored tensor; its content is there once `attachment.wait_tensor(name)` has returned.

    A tensor that starts where its elements may not (possible in place, never in a converted checkpoint) is
    waited for and copied.

    Raises:
        CheckpointInvalid: torch has no such dtype.
        LoadFailed: A tensor that must be copied did not arrive.
    """
    place = attachment.tensors[name]
    return _tensor(attachment, place, torch_dtype(place.dtype, name=name), attachment.buffer)


def tensors(attachment: Attachment) -> dict[str, torch.Tensor]:
    """Return every tensor by name, tied names included (they share one tensor object)."""
    whole = cache(attachment.buffer)
    kinds: dict[str, tuple[torch.dtype, int]] = {}
    found: dict[str, torch.Tensor] = {}
    for name, place in attachment.tensors.items():
        _, stored, extents, file, offset, nbytes, _ = place
        if stored not in kinds:
            kinds[stored] = _kind(stored, name)
        dtype, item_bytes = kinds[stored]
        if extents and nbytes and item_bytes and not offset % item_bytes:  # as nearly all are
            flat = frombuffer(whole(file), dtype=dtype, count=nbytes // item_bytes, offset=offset)
            found[name] = flat if len(extents) == 1 else flat.view(*extents)  # one by one: read faster
        else:
            found[name] = _tensor(attachment, place, dtype, whole)
    for stored, *others in attachment.tied:
        found.update(dict.fromkeys(others, found[stored]))
    return found


def _kind(stored: str, name: str) -> tuple[torch.dtype, int]:
    """Return torch's dtype and the bytes of an element; 0: its elements come in pairs."""
    dtype = torch_dtype(stored, name=name)
    return dtype, dtype.itemsize if torch_shape(stored, (2,), name=name) == (2,) else 0


def _tensor(
    attachment: Attachment, place: Tensor, dtype: torch.dtype, whole: Callable[[int], memoryview]
) -> torch.Tensor:
    """As `tensor`; `dtype` is torch's, `whole` gives all bytes of a file."""
    name, stored, extents, file, offset, nbytes, _ = place
    shape = torch_shape(stored, extents, name=name)
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    raw = whole(file)
    item_bytes = dtype.itemsize
    if offset % item_bytes == 0:
        return frombuffer(raw, dtype=dtype, count=nbytes // item_bytes, offset=offset).view(shape)
    attachment.wait_tensor(name)
    found = frombuffer(raw, dtype=torch.uint8, count=nbytes, offset=offset)
    return shaped(found, dtype=stored, shape=extents, name=name)
