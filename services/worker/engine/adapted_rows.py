"""What LoRA adapters add to the rows of a forward pass; the model's weights are never touched.

A pass has rows of several sessions, each with an adapter or without one. Modules that some adapter changes
get a forward hook, which takes the rows of one adapter out of the module's input and adds their change to
the same rows of its output (`stoker.models.lora`). Rows without an adapter keep the bits they would have had.

A row's change has the same bits whatever else is in the batch, for the reason that the base's products do
(`row_linear`): each of the two small products takes exactly as many rows at a time as the base's of that
pass, padded with zeros. Where a pass is of one session only, and its products take all rows at once, so do
these. Scaling and adding are single roundings per element, the same in vector and scalar code.

Everything here belongs to the engine's thread. Shapes: T rows, I in, O out.
"""

# ruff: noqa: N803, N806 - tensors carry shape suffixes

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from stoker.errors import CheckpointInvalid
from stoker.models.lora import lora_delta

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from stoker.models.lora import LoraWeights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterWeights:
    """An adapter in memory, fitted to this worker's model.

    Attributes:
        name: What clients call it.
        uri: Where it came from.
        revision: With the uri, its identity: two of equal identity give equal bits.
        modules: Its matrices by module.
    """

    name: str
    uri: str
    revision: str
    modules: Mapping[str, LoraWeights]

    @property
    def identity(self) -> tuple[str, str]:
        """What tells it from every other adapter."""
        return self.uri, self.revision


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The rows of one adapter in a pass."""

    adapter: AdapterWeights
    rows: torch.Tensor
    """Their indices."""


class AdaptedModules:
    """One model's modules that adapters change.

    Args:
        model: Gets hooks when the first session with an adapter comes; until then nothing changes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooked: set[str] = set()
        self._parts: tuple[_Part, ...] = ()
        self._pass_rows = 0
        self._group_rows = 0

    @contextmanager
    def adding(
        self, adapters: Sequence[AdapterWeights | None], *, pass_rows: int, group_rows: int
    ) -> Iterator[None]:
        """Make the forward pass inside the `with` add each row's adapter.

        Args:
            adapters: One per row, None for none; padding rows at the end are left out.
            pass_rows: T, padding included.
            group_rows: Rows that each product takes; 0: all of an adapter's at once.
        """
        self._parts = self._parts_of(adapters)
        self._pass_rows, self._group_rows = pass_rows, group_rows
        try:
            yield
        finally:
            self._parts = ()

    def _parts_of(self, adapters: Sequence[AdapterWeights | None]) -> tuple[_Part, ...]:
        places: dict[tuple[str, str], tuple[AdapterWeights, list[int]]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                places.setdefault(adapter.identity, (adapter, []))[1].append(row)
        for adapter, _ in places.values():
            for name in adapter.modules.keys() - self._hooked:
                self._model.get_submodule(name).register_forward_hook(self._hook(name))
                self._hooked.add(name)
        return tuple(
            _Part(adapter=adapter, rows=torch.tensor(rows, device=_device(adapter)))
            for adapter, rows in places.values()
        )

    def _hook(self, name: str) -> Any:
        def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            for part in self._parts:
                weights = part.adapter.modules.get(name)
                if weights is not None:
                    self._add(name, part, weights, inputs[0], output)

        return add

    def _add(
        self, name: str, part: _Part, weights: LoraWeights, input_BTI: torch.Tensor, output_BTO: torch.Tensor
    ) -> None:
        """Add one adapter's change in place: the output is the module's own fresh tensor."""
        x_TI = input_BTI.reshape(-1, input_BTI.shape[-1])
        if x_TI.shape[0] != self._pass_rows:
            raise CheckpointInvalid(
                f"adapter {part.adapter.name!r} changes {name}, which sees {x_TI.shape[0]} rows of a pass of "
                f"{self._pass_rows}: this engine can't tell whose they are; train it without that module"
            )
        delta_TO = _delta(x_TI.index_select(0, part.rows), weights, self._group_rows)
        output_BTO.view(-1, output_BTO.shape[-1]).index_add_(0, part.rows, delta_TO)


def _device(adapter: AdapterWeights) -> torch.device:
    return next(iter(adapter.modules.values())).a_RI.device


def _delta(x_TI: torch.Tensor, weights: LoraWeights, group_rows: int) -> torch.Tensor:
    """Return what is added to these rows, made of products of `group_rows` rows."""
    count = x_TI.shape[0]
    if not group_rows or count == group_rows:
        return lora_delta(x_TI, weights)
    padded_TI = pad(x_TI, (0, 0, 0, -count % group_rows))
    pieces = [lora_delta(piece_TI, weights) for piece_TI in torch.split(padded_TI, group_rows)]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[:count]
