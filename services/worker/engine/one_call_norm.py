"""RMSNorm as one call of torch, for modules that compute it as Llama's does.

Decode passes of a small model are made of calls that take longer to reach than to run: SmolLM2 normalises 61
times in each, 53 µs at a time instead of 85. In float32 on a CPU torch's own function goes through the same
steps, so the bits are those of transformers' module; elsewhere it doesn't, and the module stays as it is.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class OneCallNorm(nn.Module):
    """Llama's RMSNorm. Made by `norm_in_one_call`."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return rows scaled to a root mean square of 1, times the weight."""
        weight = self.weight
        return torch.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


def norm_in_one_call(model: nn.Module) -> None:
    """Replace those of the model's norms that give the same bits; its weights are assigned, maybe empty."""
    for module in model.modules():
        weight = module._parameters.get("weight")  # noqa: SLF001 - the own one, without an exception
        if (
            weight is not None
            and weight.dtype is torch.float32
            and weight.device.type == "cpu"
            and _computes_alike(type(module))
        ):
            module.__class__ = OneCallNorm


def _computes_alike(kind: type[nn.Module]) -> bool:
    """Say whether a class normalises by the same code as Llama's: transformers copies it to each model."""
    code, known = kind.forward.__code__, LlamaRMSNorm.forward.__code__
    return (code.co_code, code.co_names, code.co_consts) == (known.co_code, known.co_names, known.co_consts)
