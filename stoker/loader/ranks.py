"""Put one tensor-parallel rank's pieces into a model that transformers distributes. Imports transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import initialize_distributed_mesh

from stoker.errors import CheckpointInvalid, InvalidRequest
from stoker.models.tensor_parallel import plan_cuts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stoker.checkpoint.index import CheckpointIndex
    from stoker.models.skeleton import Skeleton


def rank_of_this_process(tp_size: int) -> int:
    """Return which rank this process is among all of the process group's.

    Raises:
        InvalidRequest: There is no process group, or it has another size.
    """
    if tp_size < 1:
        raise InvalidRequest(f"tp_size is {tp_size}; give 1 (no ranks) or more", param="tp_size")
    if not torch.distributed.is_initialized():
        raise InvalidRequest(
            f"tp_size={tp_size} needs {tp_size} processes that know each other: start them with torchrun "
            "and call torch.distributed.init_process_group first",
            param="tp_size",
        )
    size = torch.distributed.get_world_size()
    if size != tp_size:
        raise InvalidRequest(
            f"tp_size={tp_size}, and the process group has {size} processes; start one per rank",
            param="tp_size",
        )
    return torch.distributed.get_rank()


def distribute(skeleton: Skeleton, index: CheckpointIndex, config_text: bytes) -> None:
    """Make a skeleton's parameters those of this rank and give its modules what transformers' plan says.

    Args:
        skeleton: Its parameters are on the meta device.
        index: Of this rank.
        config_text: The checkpoint's `config.json`.

    Raises:
        CheckpointInvalid: The checkpoint was cut by another plan than this transformers has.
    """
    whole = {
        tensor.name: index.cuts[tensor.name].whole_shape(tensor.shape, index.ranks)
        if tensor.name in index.cuts
        else tensor.shape
        for tensor in index.tensors
    }
    cuts = plan_cuts(config_text, whole, ranks=index.ranks, where=str(index.path))
    if cuts != dict(index.cuts):
        raise CheckpointInvalid(
            f"{index.path} was cut by another tp_plan than this transformers has for "
            f"{skeleton.architecture}; convert the original again."
        )
    plan = DistributedConfig(tp_size=index.ranks)
    mesh = initialize_distributed_mesh(plan)[1]
    skeleton.model = type(skeleton.model).maybe_distribute_model(skeleton.model, plan, mesh)


def as_pieces(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return this rank's tensors as pieces of the whole ones, for the parameters that are distributed."""
    expected = dict(model.named_parameters())
    prefix = f"{model.base_model_prefix}."
    pieces: dict[int, torch.Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        place = expected.get(name, expected.get(prefix + name))
        if not isinstance(place, DTensor):
            found[name] = tensor
            continue
        if id(tensor) not in pieces:
            pieces[id(tensor)] = _piece(name, tensor, place)
        found[name] = pieces[id(tensor)]
    return found


def _piece(name: str, tensor: torch.Tensor, place: DTensor) -> DTensor:
    local = place.to_local()
    if local.shape != tensor.shape:
        raise CheckpointInvalid(
            f"{name} is {list(tensor.shape)}, and this rank's piece of {list(place.shape)} is "
            f"{list(local.shape)}: the checkpoint was cut for another plan; convert the original again."
        )
    piece: DTensor = DTensor.from_local(
        tensor, place.device_mesh, place.placements, run_check=False, shape=place.shape, stride=place.stride()
    )
    return piece
