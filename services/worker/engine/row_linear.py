"""Matrix products whose result for a row does not depend on how many rows there are.

The bits of `x @ W` depend on the number of rows of `x`: libraries choose another kernel, with another order
of summation, for 1, 2, 3 … rows. So in a decode step every product is made on exactly `group_rows` rows at a
time, padded with zeros, whatever the batch. That costs little or nothing: MKL on AVX-512 works through 3 rows
at a time anyway (docs/decisions/0002-engine.md has the numbers). Where `row_proof` found that a larger
product has the same bits on this host, one takes the place of several; `row_product` cuts it.

Inputs are flattened to two dimensions, in prefill too: for bfloat16 on the CPU torch takes a path that is 5
to 20 times slower when `linear` gets three.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from services.worker.engine.attention import active_plan
from services.worker.engine.row_product import RowProduct, row_product

MAX_PRODUCTS = 64
"""Remembered for one layer; there is one for each number of rows that passes have."""


class RowProducts:
    """The products of one layer's weight, which stays where it is once a pass has run."""

    __slots__ = ("_settled",)

    def __init__(self) -> None:
        self._settled: dict[tuple[int, int, int], RowProduct] = {}

    def apply(self, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """Return x @ weight + bias, each row with the bits of its group."""
        terms = x.shape[-1]
        rows = x.view(-1, terms) if x.is_contiguous() else x.reshape(-1, terms)
        count = rows.shape[0]
        plan = active_plan()
        group = (plan.group_of(count) if plan is not None else 0) or count
        missing = -count % group
        key = (count + missing, group, torch.get_num_threads())
        made = self._settled.get(key) or self._make(key, layer)
        if not missing:
            return made.of(rows).view(*x.shape[:-1], made.columns)
        # Rare: passes are made of whole groups.
        return made.of(pad(rows, (0, 0, 0, missing)))[:count].view(*x.shape[:-1], made.columns)

    def _make(self, key: tuple[int, int, int], layer: nn.Module) -> RowProduct:
        weight, bias = layer.weight, layer.bias
        made = row_product(
            key[0],
            key[1],
            weight.t() if isinstance(layer, nn.Linear) else weight,  # type: ignore[operator,arg-type]
            bias,  # type: ignore[arg-type]
        )
        if made.is_settled:
            if len(self._settled) >= MAX_PRODUCTS:
                self._settled.clear()
            self._settled[key] = made
        return made


class RowLinear(nn.Linear):
    """`nn.Linear`, made of products of equal shape. Made by `make_rows_uniform`."""

    products: RowProducts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight.T + bias."""
        return self.products.apply(x, self)


class RowConv1D(Conv1D):  # type: ignore[misc]  # transformers is untyped
    """transformers' `Conv1D` (GPT-2's linear layer), made of products of equal shape."""

    products: RowProducts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight + bias."""
        return self.products.apply(x, self)


_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: RowLinear,
    RowLinear: RowLinear,
    Conv1D: RowConv1D,
    RowConv1D: RowConv1D,
}
_ROW_LOCAL = (nn.Linear, Conv1D, nn.Embedding)


def make_rows_uniform(model: nn.Module) -> bool:
    """Replace the model's linear layers in place.

    Args:
        model: Its weights are assigned; they may still be empty.

    Returns:
        True if no other module owns a matrix, so that a forward pass of several sessions' rows gives each row
        its own bits. False otherwise (mixtures of experts): rows must then go through the model one by one.
    """
    uniform = True
    for module in model.modules():
        replacement = _REPLACEMENTS.get(type(module))
        if replacement is not None:
            module.__class__ = replacement
            module.products = RowProducts()  # type: ignore[assignment]  # no module, parameter or buffer
        elif not isinstance(module, _ROW_LOCAL):
            uniform = uniform and all(
                parameter is None or parameter.ndim < 2  # noqa: PLR2004 - a matrix
                for parameter in module._parameters.values()  # noqa: SLF001 - the own ones, without a walk
            )
    return uniform
