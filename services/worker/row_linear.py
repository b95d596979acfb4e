"""Matrix products whose result for a row does not depend on how many rows there are.

The bits of `x @ W` depend on the number of rows of `x`: libraries choose another kernel, with another order
of summation, for 1, 2, 3 … rows. So in a decode step every product is made on exactly `group_rows` rows at a
time, padded with zeros, whatever the batch. That costs little or nothing: MKL on AVX-512 works through 3 rows
at a time anyway (docs/decisions/0002-engine.md has the numbers). Where `row_proof` found that a larger
product has the same bits on this host, one takes the place of several.

Inputs are flattened to two dimensions, in prefill too: for bfloat16 on the CPU torch takes a path that is 5
to 20 times slower when `linear` gets three.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from services.worker.attention import active_plan
from services.worker.row_proof import MAX_ROWS, ProductShape, RowProofs, product
from stoker.units import MIB


class RowLinear(nn.Linear):
    """`nn.Linear`, made of products of equal shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight.T + bias."""
        return _by_groups(x, self.weight.t(), self.bias)


class RowConv1D(Conv1D):  # type: ignore[misc]  # transformers is untyped
    """transformers' `Conv1D` (GPT-2's linear layer), made of products of equal shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight + bias."""
        return _by_groups(x, self.weight, self.bias)


BLOCK_BYTES = 8 * MIB
"""Of a weight, multiplied with all groups of rows before the next part is read from memory."""
CACHE_LINE_BYTES = 64
PROOFS = RowProofs()
"""Facts of this host and process, whatever the model."""
MAX_REMEMBERED = 65536
_PROVEN: set[tuple[object, ...]] = set()
"""Products of this process's weights whose shapes are all proven: one look-up instead of several."""

_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: RowLinear, Conv1D: RowConv1D}
_ROW_LOCAL = (nn.Linear, Conv1D, nn.Embedding)


def make_rows_uniform(model: nn.Module) -> bool:
    """Replace the model's linear layers in place.

    Returns:
        True if no other module owns a matrix, so that a forward pass of several sessions' rows gives each row
        its own bits. False otherwise (mixtures of experts): rows must then go through the model one by one.
    """
    uniform = True
    for module in model.modules():
        replacement = _REPLACEMENTS.get(type(module))
        if replacement is not None:
            module.__class__ = replacement
        elif not isinstance(module, _ROW_LOCAL):
            uniform = uniform and all(
                parameter is None or parameter.ndim < 2  # noqa: PLR2004 - a matrix
                for parameter in module._parameters.values()  # noqa: SLF001 - the own ones, without a walk
            )
    return uniform


def _by_groups(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    plan = active_plan()
    rows = x.reshape(-1, x.shape[-1])
    count, columns = rows.shape[0], weight.shape[1]
    group = (plan.group_of(count) if plan is not None else 0) or count
    missing = -count % group
    if missing:  # rare: passes are made of whole groups
        rows = pad(rows, (0, 0, 0, missing))
    step = _block_columns(weight)
    at_once = _rows_at_once(rows, group, weight, step, has_bias=bias is not None)
    if at_once == count and step >= columns:
        out = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        return out.view(*x.shape[:-1], columns)
    out = rows.new_empty((count + missing, columns))
    for left in range(0, columns, step):
        block = weight[:, left : left + step]
        block_bias = None if bias is None else bias[left : left + step]
        for top in range(0, count, at_once):
            product(
                rows[top : top + at_once], block, block_bias, out[top : top + at_once, left : left + step]
            )
    return out[:count].view(*x.shape[:-1], columns)


def _rows_at_once(rows: torch.Tensor, group: int, weight: torch.Tensor, step: int, *, has_bias: bool) -> int:
    """Return how many rows each product may take: all, if proven for all blocks, else those of a group."""
    count, columns = rows.shape[0], weight.shape[1]
    if count == group or count > MAX_ROWS or rows.device.type != "cpu":
        return group
    place, threads = weight.data_ptr(), torch.get_num_threads()
    known = (count, group, place, weight.shape, rows.dtype, has_bias, threads)
    if known in _PROVEN:
        return count
    is_transposed, offset_bytes = weight.stride(0) == 1, place % CACHE_LINE_BYTES
    widths = {min(step, columns), columns % step or step} if step < columns else {columns}
    # Every width is asked for, so that all that lack a proof get one.
    proofs = [
        PROOFS.holds(
            ProductShape(
                rows=count,
                group=group,
                terms=rows.shape[1],
                columns=width,
                dtype=rows.dtype,
                is_transposed=is_transposed,
                has_bias=has_bias,
                is_strided=step < columns,
                offset_bytes=offset_bytes,
                threads=threads,
            )
        )
        for width in widths
    ]
    if not all(proofs):
        return group
    if len(_PROVEN) >= MAX_REMEMBERED:
        _PROVEN.clear()
    _PROVEN.add(known)
    return count


def _block_columns(weight: torch.Tensor) -> int:
    """Return how many columns of a weight stay in the processor's cache from one group to the next."""
    if weight.device.type != "cpu":
        return weight.shape[1]
    fitting = BLOCK_BYTES // (weight.shape[0] * weight.element_size())
    return max(64, fitting - fitting % 64)
