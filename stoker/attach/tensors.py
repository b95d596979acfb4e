"""torch tensors that are the store's memory: no byte is copied, every replica on the host shares them.

A tensor holds its mapping and with it the lease. Writing to a tensor in place copies the pages it touches for
this process only.
"""

from __future__ import annotations

import torch

from stoker.attach.attachment import Attachment
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
    dtype = torch_dtype(place.dtype, name=name)
    if place.nbytes == 0:
        return torch.empty(torch_shape(place.dtype, place.shape, name=name), dtype=dtype)
    if place.offset % dtype.itemsize:
        attachment.wait_tensor(name)
    raw = torch.frombuffer(attachment.buffer(place.file, place.offset, place.nbytes), dtype=torch.uint8)
    return shaped(raw, dtype=place.dtype, shape=place.shape, name=name)


def tensors(attachment: Attachment) -> dict[str, torch.Tensor]:
    """Return every tensor by name, tied names included (they share one tensor object)."""
    found = {name: tensor(attachment, name) for name in attachment.tensors}
    for stored, *others in attachment.tied:
        found.update(dict.fromkeys(others, found[stored]))
    return found
