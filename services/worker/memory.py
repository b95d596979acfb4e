"""What the device of a replica has, and the refusal of what it can't hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from stoker.errors import CapacityError, DoesNotFit, InvalidRequest
from stoker.units import format_bytes
from stoker.v1.model_pb2 import CheckpointInfo, ModelSpec


def device_of(indices: Sequence[int]) -> torch.device:
    """Return the device a replica runs on.

    Args:
        indices: CUDA devices it was reserved; none = the processor.

    Raises:
        InvalidRequest: Several devices, which this engine can't use, or one that torch does not see.
    """
    if not indices:
        return torch.device("cpu")
    if len(indices) > 1:
        raise InvalidRequest(f"this engine runs a model on one device; {len(indices)} were reserved")
    index = indices[0]
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise InvalidRequest(
            f"CUDA device {index} was reserved, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()}: install a torch build for this GPU's driver"
        )
    return torch.device("cuda", index)


def available_bytes(device: torch.device) -> int:
    """Return the memory a device could still give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def refuse_what_cannot_fit(
    spec: ModelSpec, checkpoint: CheckpointInfo, device: torch.device, *, ranks: int = 1
) -> None:
    """Check a model, or one of its equal ranks, against a device before anything is allocated there.

    On the processor the weights are the store's memory, which the store has admitted; only the cache and a
    copy in another dtype need room.

    Raises:
        DoesNotFit: The device is smaller than the model.
        CapacityError: It is large enough, but not free enough now.
    """
    if device.type == "cuda":
        total_bytes = int(torch.cuda.mem_get_info(device)[1])
        check_room(
            f"model {spec.name} on {device}",
            need_bytes=-(-(checkpoint.weight_bytes + spec.kv_cache_bytes) // ranks),
            total_bytes=total_bytes,
            free_bytes=available_bytes(device),
        )
    elif spec.kv_cache_bytes:
        free_bytes = available_bytes(device)
        check_room(
            f"the key/value cache of model {spec.name}",
            need_bytes=-(-spec.kv_cache_bytes // ranks),
            total_bytes=free_bytes,
            free_bytes=free_bytes,
        )


def check_room(what: str, *, need_bytes: int, total_bytes: int, free_bytes: int) -> None:
    """Refuse what needs more than there is; raises as `refuse_what_cannot_fit`."""
    if need_bytes > total_bytes:
        raise DoesNotFit(
            f"{what} needs {format_bytes(need_bytes)}; there are {format_bytes(total_bytes)}: "
            "use a larger device, a smaller dtype or a smaller kv_cache_bytes"
        )
    if need_bytes > free_bytes:
        raise CapacityError(
            f"{what} needs {format_bytes(need_bytes)}; {format_bytes(free_bytes)} of "
            f"{format_bytes(total_bytes)} are free: stop what else runs there",
            retry_after_seconds=5.0,
        )
