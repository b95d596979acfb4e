"""LoRA adapters on a model that is loaded already: its weights are not touched, only outputs are added to.

For one process and one adapter at a time `attach_adapter` hooks the modules; an engine that batches requests
with different adapters calls `lora_delta` for its rows instead. Shapes: T rows, I in, O out, R rank.
"""

# ruff: noqa: N803, N806, N815 - tensors carry shape suffixes

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stoker.errors import AlreadyExists, CheckpointInvalid, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stoker.checkpoint.adapter import LoraPlan

ADAPTERS_ATTRIBUTE = "stoker_adapters"
"""Where a model keeps its adapters."""

_SHOWN_NAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraWeights:
    """One module's change.

    Attributes:
        a_RI: In the model's dtype, on its device.
        b_OR: Likewise.
        scale: What `b_OR a_RI x` is multiplied by.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float


def lora_delta(x_TI: torch.Tensor, weights: LoraWeights) -> torch.Tensor:
    """Return what an adapter adds to a module's output, `[..., T, O]`, for its input `[..., T, I]`.

    Two small products, in the input's dtype: `(x Aᵀ) Bᵀ · scale`. A row's result depends on no other row but
    by how a library multiplies; an engine that must not depend on the batch calls it for each session's rows.
    """
    delta_TO: torch.Tensor = nn.functional.linear(nn.functional.linear(x_TI, weights.a_RI), weights.b_OR)
    return delta_TO * weights.scale


class Adapters:
    """The adapters of one model, several at a time, of which at most one is active."""

    def __init__(self, model: nn.Module) -> None:
        """Args: model: loaded; its modules get hooks that do nothing while no adapter is active."""
        self._model = model
        self._weights: dict[str, dict[str, LoraWeights]] = {}
        self._hooked: dict[str, Any] = {}
        self._active: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Attached adapters, in the order they came."""
        return tuple(self._weights)

    @property
    def active(self) -> str | None:
        """The adapter that changes outputs now; None = the base as it is."""
        return self._active

    def weights(self, name: str) -> Mapping[str, LoraWeights]:
        """Return an adapter's weights by module, for an engine that applies them itself.

        Raises:
            NotFound: There is no such adapter.
        """
        if name not in self._weights:
            raise NotFound(
                f"this model has no adapter {name!r}; attached are {', '.join(self._weights) or 'none'}"
            )
        return self._weights[name]

    def add(self, name: str, weights: dict[str, LoraWeights]) -> None:
        """Attach an adapter.

        Raises:
            AlreadyExists: One of this name is attached.
        """
        if name in self._weights:
            raise AlreadyExists(
                f"this model has an adapter {name!r} already; detach it or choose another name"
            )
        for module in weights.keys() - self._hooked.keys():
            self._hooked[module] = self._model.get_submodule(module).register_forward_hook(self._hook(module))
        self._weights[name] = weights

    def remove(self, name: str) -> None:
        """Detach an adapter, active or not.

        Raises:
            NotFound: There is no such adapter.
        """
        self.weights(name)
        del self._weights[name]
        if self._active == name:
            self._active = None
        used = {module for each in self._weights.values() for module in each}
        for module in self._hooked.keys() - used:
            self._hooked.pop(module).remove()

    def activate(self, name: str | None) -> None:
        """Make one adapter change the outputs from now on; None = none.

        Raises:
            NotFound: There is no such adapter.
        """
        if name is not None:
            self.weights(name)
        self._active = name

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Activate an adapter, or none, inside a `with`.

        Raises:
            NotFound: There is no such adapter.
        """
        before = self._active
        self.activate(name)
        try:
            yield
        finally:
            self._active = before if before in self._weights else None

    def _hook(self, module: str) -> Any:
        def add_delta(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
            weights = self._weights[self._active].get(module) if self._active is not None else None
            return output if weights is None else output + lora_delta(inputs[0], weights)

        return add_delta


def adapters_of(model: nn.Module) -> Adapters:
    """Return a model's adapters, none at first."""
    found = model.__dict__.get(ADAPTERS_ATTRIBUTE)
    if found is None:
        found = model.__dict__[ADAPTERS_ATTRIBUTE] = Adapters(model)
    adapters: Adapters = found
    return adapters


def fitted(
    model: nn.Module, adapter: LoraPlan, tensors: Mapping[str, torch.Tensor]
) -> dict[str, LoraWeights]:
    """Return an adapter's weights for the modules of a model, in its dtype and on its device.

    Args:
        model: The base.
        adapter: What is to be attached.
        tensors: Its tensors by their names in the file, on any device.

    Raises:
        CheckpointInvalid: The adapter is for another model: modules are missing or of other widths.
    """
    modules = dict(model.named_modules())
    wrong = [
        f"{name} ({_fault(modules.get(name), pair.in_features, pair.out_features)})"
        for name, pair in adapter.pairs.items()
        if _fault(modules.get(name), pair.in_features, pair.out_features)
    ]
    if wrong:
        raise CheckpointInvalid(
            f"{adapter.location} is no adapter for this {type(model).__name__}: "
            f"{', '.join(wrong[:_SHOWN_NAMES])}"
            f"{f' and {len(wrong) - _SHOWN_NAMES} more' if len(wrong) > _SHOWN_NAMES else ''}; it was "
            f"trained on {adapter.base_model or 'a model that it does not name'}"
        )
    found = {}
    for name, pair in adapter.pairs.items():
        weight: Any = modules[name].weight
        found[name] = LoraWeights(
            a_RI=tensors[pair.a].to(device=weight.device, dtype=weight.dtype),
            b_OR=tensors[pair.b].to(device=weight.device, dtype=weight.dtype),
            scale=pair.scale,
        )
    return found


def _fault(module: nn.Module | None, in_features: int, out_features: int) -> str:
    """Say what keeps an adapter of these widths from a module; empty when nothing does."""
    if module is None:
        return "no such module"
    if isinstance(module, nn.Linear):
        widths = (module.in_features, module.out_features)
    elif any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf"):
        # GPT-2's transposed linear, or an engine's variant of it
        widths = (int(module.nx), int(module.nf))  # type: ignore[arg-type]
    else:
        return f"a {type(module).__name__}, not a linear module"
    wanted = (in_features, out_features)
    return "" if widths == wanted else f"{widths[0]} → {widths[1]}, not {wanted[0]} → {wanted[1]}"
