"""A transformers model without weights: modules on the meta device, small computed buffers made for real.

Needs torch and transformers.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import initialization

from stoker.errors import CheckpointInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(slots=True, kw_only=True)
class Skeleton:
    """A model without weights."""

    model: Any
    """A transformers `PreTrainedModel`; its parameters are on the meta device."""
    architecture: str
    tied: dict[str, str]
    """Parameter name → name of the parameter it is the same as."""


def empty_model(
    model_class: Any, config: Any, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Skeleton:
    """Build the modules that `config` describes, without weights, in eval mode.

    Args:
        model_class: A `PreTrainedModel` class of transformers.
        config: Its config; what it says (attention implementation too) is what is built.
        device: Where the model will run: where computed buffers go. None is the CPU.
        dtype: What computed buffers and constants are made in where the model leaves it open; None is torch's
            default.

    Raises:
        CheckpointInvalid: The config doesn't describe such a model.
    """
    architecture = model_class.__name__
    try:
        with torch.device("meta"), initialization.no_init_weights(), _default_dtype(dtype):
            model = model_class(config)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointInvalid(f"config.json doesn't describe a {architecture}: {error}") from error
    _materialise_buffers(model, device or torch.device("cpu"))
    for module in model.modules():
        module.__dict__["training"] = False  # what eval() does, ten times as fast
    return Skeleton(model=model, architecture=architecture, tied=dict(model.all_tied_weights_keys))


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _materialise_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies), on `device`."""
    owners: dict[str, nn.Module] = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        owners[owner] = model.get_submodule(owner)
        owners[owner]._buffers[leaf] = torch.empty_like(buffer, device=device)  # noqa: SLF001 - in place of a meta tensor
    with torch.no_grad():
        for owner_module in owners.values():
            model._init_weights(owner_module)  # noqa: SLF001 - how transformers itself computes them
