"""Matrix products whose result for a row does not depend on how many rows there are.

The bits of `x @ W` depend on the number of rows of `x`: libraries choose another kernel, with another order
of summation, for 1, 2, 3 … rows. So in a decode step every product is made on exactly `group_rows` rows at a
time, padded with zeros, whatever the batch. That costs little or nothing: MKL on AVX-512 works through 3 rows
at a time anyway (docs/decisions/0002-engine.md has the numbers). Where `row_proof` found that a larger
product has the same bits on this host, one takes the place of several.

A processor's cache decides what a product costs. MKL goes through a weight once for each 3 of up to 15 rows,
so such a product takes as many columns as stay in the cache, then the next: 26 ms instead of 35 for 8 rows.
And where the processor can't multiply 16-bit floats, products of a prefill convert a cache's worth of the
weight to float32 and multiply that: less than half the time for 256 rows, and rounded once, at the end.

Inputs are flattened to two dimensions, in prefill too: for bfloat16 on the CPU torch takes a path that is 5
to 20 times slower when `linear` gets three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from services.worker.attention import active_plan
from services.worker.row_proof import MAX_ROWS, ProductShape, RowProofs, product
from stoker.units import KIB, MIB


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
WHOLE_BYTES = BLOCK_BYTES // 2
"""A weight of no more bytes is one block: rounding a block down leaves at least half of its bound."""
CACHED_BYTES = 768 * KIB
"""Of a weight, that stays in a core's own cache while it is multiplied (docs/decisions/0002-engine.md)."""
PASSES_ROWS = 16
"""Below so many rows MKL goes through a weight once for each few of them."""
WIDENED_ROWS = 16
"""Groups of so many rows are worth a conversion of the weight."""
CACHE_LINE_BYTES = 64
PROOFS = RowProofs()
"""Facts of this host and process, whatever the model."""
FLOAT32_BYTES = 4
_HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - their names
_HAS_FLOAT16 = torch.cpu._is_amx_fp16_supported()  # noqa: SLF001 - its only name
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
    if count == group < WIDENED_ROWS and weight.numel() * weight.element_size() <= WHOLE_BYTES:
        # What comes out below, too: the usual case of a decode pass, 200 times in each.
        out = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
        return out.view(*x.shape[:-1], columns)
    missing = -count % group
    if missing:  # rare: passes are made of whole groups
        rows = pad(rows, (0, 0, 0, missing))
    is_widened = group >= WIDENED_ROWS and _multiplies_as_float32(weight)
    step = _block_columns(weight, is_widened=is_widened)
    at_once = group
    if group < rows.shape[0] <= MAX_ROWS and rows.device.type == "cpu":
        block_step = _large_block_columns(rows.shape[0], weight, step)
        key = (rows.shape[0], group, weight.data_ptr(), weight.shape, rows.dtype, bias is not None)
        if _is_proven((*key, torch.get_num_threads()), weight, step, block_step, is_widened=is_widened):
            at_once, step = rows.shape[0], block_step
    if at_once == rows.shape[0] and step >= columns and not is_widened:
        out = torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
    else:
        out = _in_blocks(rows, weight, bias, at_once, step, is_widened=is_widened)
    return out[:count].view(*x.shape[:-1], columns)


def _in_blocks(  # noqa: PLR0913 - a product, and how it is cut
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    at_once: int,
    step: int,
    *,
    is_widened: bool,
) -> torch.Tensor:
    """Return the product, made `step` columns and `at_once` rows at a time."""
    dtype = rows.dtype
    if is_widened:
        rows, bias = rows.float(), None if bias is None else bias.float()
    count, columns = rows.shape[0], weight.shape[1]
    out = rows.new_empty((count, columns))
    for left in range(0, columns, step):
        block = weight[:, left : left + step]
        if is_widened:
            block = block.float()
        block_bias = None if bias is None else bias[left : left + step]
        for top in range(0, count, at_once):
            product(
                rows[top : top + at_once], block, block_bias, out[top : top + at_once, left : left + step]
            )
    return out.to(dtype)


def _is_proven(
    key: tuple[Any, ...], weight: torch.Tensor, step: int, block_step: int, *, is_widened: bool
) -> bool:
    """Say whether products of all rows and `block_step` columns are proven to equal those of a group.

    Args:
        key: Rows, rows of a group, the weight's address and shape, dtype, whether there is a bias, threads.
        weight: The weight.
        step: Columns of a small product.
        block_step: Columns of a large product.
        is_widened: Whether both are made in float32.
    """
    if key in _PROVEN:
        return True
    count, group, place, (terms, columns), dtype, has_bias, threads = key
    widths = {min(step, columns), columns % step or step} if step < columns else {columns}
    # Every width is asked for, so that all that lack a proof get one.
    proofs = [
        PROOFS.holds(
            ProductShape(
                rows=count,
                group=group,
                terms=terms,
                columns=width,
                block_columns=min(block_step, width),
                dtype=dtype,
                is_widened=is_widened,
                is_transposed=weight.stride(0) == 1,
                has_bias=has_bias,
                is_strided=step < columns,
                offset_bytes=place % CACHE_LINE_BYTES,
                threads=threads,
            )
        )
        for width in widths
    ]
    if not all(proofs):
        return False
    if len(_PROVEN) >= MAX_REMEMBERED:
        _PROVEN.clear()
    _PROVEN.add(key)
    return True


def _block_columns(weight: torch.Tensor, *, is_widened: bool) -> int:
    """Return how many columns small products take at a time."""
    if weight.device.type != "cpu":
        return weight.shape[1]
    cached = _cached_columns(weight)
    if is_widened:
        return cached
    fitting = BLOCK_BYTES // (weight.shape[0] * weight.element_size())
    return max(cached, fitting - fitting % cached)


def _large_block_columns(rows: int, weight: torch.Tensor, step: int) -> int:
    """Return how many columns a product of many rows takes at a time; `step` is a multiple of it."""
    goes_in_passes = rows < PASSES_ROWS and weight.dtype is torch.float32
    return _cached_columns(weight) if goes_in_passes else step


def _cached_columns(weight: torch.Tensor) -> int:
    """Return how many columns of a weight, as float32, stay in a core's own cache."""
    fitting = CACHED_BYTES // (weight.shape[0] * FLOAT32_BYTES)
    return max(64, fitting - fitting % 64)


def _multiplies_as_float32(weight: torch.Tensor) -> bool:
    """Say whether this processor is quicker with float32 copies of a weight of 16-bit floats."""
    if weight.device.type != "cpu":
        return False
    if weight.dtype is torch.bfloat16:
        return not _HAS_BFLOAT16
    return weight.dtype is torch.float16 and not _HAS_FLOAT16
