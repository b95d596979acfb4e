"""Devices by name, and tensors on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stoker.checkpoint.torch_views import shaped
from stoker.errors import DoesNotFit, InvalidRequest

if TYPE_CHECKING:
    from stoker.loader.sources import Source


def device_named(device: str | int | torch.device) -> torch.device:
    """Return the device, which exists on this host.

    Args:
        device: As torch takes it: `cpu`, `cuda`, `cuda:1`, a number of a CUDA device, a `torch.device`.

    Raises:
        InvalidRequest: There is no such device here; the message names those that are.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidRequest(f"{device!r} names no device: {_here()}", param="device") from error
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type == "meta":
        raise InvalidRequest("device 'meta' holds no weights; give one that does", param="device")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator is not None else 0
    if accelerator is None or found.type != accelerator.type or (found.index or 0) >= count:
        raise InvalidRequest(f"this host has no device {str(found)!r}: {_here()}", param="device")
    return found


def tensors_on(source: Source, device: torch.device) -> dict[str, torch.Tensor]:
    """Return every tensor of a received source on the device, tied names included (they share one tensor).

    On the CPU tensors are the source's memory. Elsewhere each file is copied whole into one allocation, and
    tensors are views of it.

    Raises:
        DoesNotFit: The device has not enough memory.
        CheckpointInvalid: torch has no such dtype.
    """
    try:
        raw = [_on(source.file_data(file), device) for file in range(source.file_count())]
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(f"{source.location} does not fit on {device}: {error}") from error
    found = {
        name: shaped(
            raw[place.file][place.offset : place.offset + place.nbytes],
            dtype=place.dtype,
            shape=place.shape,
            name=name,
        )
        for name, place in source.tensors.items()
    }
    for stored, *others in source.tied:
        found.update(dict.fromkeys(others, found[stored]))
    return found


def _on(data: memoryview, device: torch.device) -> torch.Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8, device=device)
    here = torch.frombuffer(data, dtype=torch.uint8)
    if device.type == "cpu":
        return here
    there = torch.empty(len(data), dtype=torch.uint8, device=device)
    there.copy_(here)
    return there


def _here() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "there is only 'cpu' here"
    names = [f"{accelerator.type}:{number}" for number in range(torch.accelerator.device_count())]
    return f"here are 'cpu', {', '.join(map(repr, names))}"
