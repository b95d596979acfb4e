"""One weight's product with so many rows: how it is cut, and which views of the weight that takes.

A processor's cache decides what a product costs. MKL goes through a weight once for each 3 of up to 15 rows,
so such a product takes as many columns as stay in the cache, then the next: 26 ms instead of 35 for 8 rows.
And where the processor can't multiply 16-bit floats, products of a prefill convert a cache's worth of the
weight to float32 and multiply that: less than half the time for 256 rows, and rounded once, at the end.

A decode pass of a small model makes some 800 such pieces, so what can be known before is: the views of the
weight's blocks are made once for each number of rows. They are no copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from services.worker.engine.row_proof import MAX_ROWS, MAX_SHAPES, ProductShape, RowProofs, product
from stoker.units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Hashable

BLOCK_BYTES = 8 * MIB
"""Of a weight, multiplied with all groups of rows before the next part is read from memory."""
CACHED_BYTES = 768 * KIB
"""Of a weight, that stays in a core's own cache while it is multiplied (docs/decisions/0002-engine.md)."""
PASSES_ROWS = 16
"""Below so many rows MKL goes through a weight once for each few of them."""
WIDENED_ROWS = 16
"""Groups of so many rows are worth a conversion of the weight."""
PROVEN_AT_ONCE_ROWS = 16
"""Groups of so many are those of prefills, where MKL copies the weight for each product: 64 rows of SmolLM2's
layers take 344 ms in groups of 32 and 204 at once, a proof of all their shapes 30."""
CACHE_LINE_BYTES = 64
FLOAT32_BYTES = 4
PROOFS = RowProofs()
"""Facts of this host and process, whatever the model."""
_HAS_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - their names
_HAS_FLOAT16 = torch.cpu._is_amx_fp16_supported()  # noqa: SLF001 - its only name


@dataclass(frozen=True, slots=True, kw_only=True)
class RowProduct:
    """A product of one weight, [terms, columns], and some rows, [rows, terms].

    Attributes:
        blocks: Of the weight, with their part of the bias: views, left to right.
        block_columns: Of each block; the last may have fewer.
        columns: Of all.
        rows: A whole number of groups.
        at_once: Rows that a piece takes.
        is_widened: Whether pieces are made in float32.
        is_settled: Whether no proof that is still to come would change anything here.
    """

    blocks: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    block_columns: int
    columns: int
    rows: int
    at_once: int
    is_widened: bool
    is_settled: bool

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight + bias, x being as many rows as this is made for."""
        if len(self.blocks) == 1 and self.at_once == self.rows and not self.is_widened:
            weight, bias = self.blocks[0]
            return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
        if self.is_widened:
            return self._pieces(x.float()).to(x.dtype)
        return self._pieces(x)

    def _pieces(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((self.rows, self.columns))
        parts = torch.split(out, self.block_columns, 1)
        if self.at_once == self.rows and not self.is_widened:
            for (weight, bias), part in zip(self.blocks, parts, strict=True):
                product(x, weight, bias, part)
            return out
        groups = torch.split(x, self.at_once)
        for (weight, bias), part in zip(self.blocks, parts, strict=True):
            block = weight.float() if self.is_widened else weight
            block_bias = bias.float() if self.is_widened and bias is not None else bias
            for group, place in zip(groups, torch.split(part, self.at_once), strict=True):
                product(group, block, block_bias, place)
        return out


def row_product(rows: int, group: int, weight: torch.Tensor, bias: torch.Tensor | None) -> RowProduct:
    """Return how to multiply so many rows and a weight, so that each row has the bits of a group.

    Args:
        rows: A multiple of `group`.
        group: Rows of the small products whose bits count.
        weight: [terms, columns], stored either way.
        bias: [columns].
    """
    cut = _cut(rows, group, weight, bias)
    columns = weight.shape[1]
    if cut.step >= columns:
        blocks: tuple[tuple[torch.Tensor, torch.Tensor | None], ...] = ((weight, bias),)
    else:
        biases = [None] * -(-columns // cut.step) if bias is None else torch.split(bias, cut.step)
        blocks = tuple(zip(torch.split(weight, cut.step, 1), biases, strict=True))
    return RowProduct(
        blocks=blocks,
        block_columns=cut.step,
        columns=columns,
        rows=rows,
        at_once=cut.at_once,
        is_widened=cut.is_widened,
        is_settled=cut.is_settled,
    )


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a product is cut, whatever the weight's numbers; fields as of `RowProduct`."""

    step: int
    """Columns of a block."""
    at_once: int
    is_widened: bool
    is_settled: bool


_CUTS: dict[tuple[Hashable, ...], _Cut] = {}
"""Those that are settled: the layers of a model ask for the same few, a first pass 200 times."""


def _cut(rows: int, group: int, weight: torch.Tensor, bias: torch.Tensor | None) -> _Cut:
    key = (
        *(rows, group, weight.shape, weight.stride(0) == 1, weight.dtype, weight.device.type, bias is None),
        *(weight.data_ptr() % CACHE_LINE_BYTES, torch.get_num_threads()),
    )
    cut = _CUTS.get(key)
    if cut is None:
        cut = _find_cut(rows, group, weight, bias)
        if cut.is_settled:
            if len(_CUTS) >= MAX_SHAPES:
                _CUTS.clear()
            _CUTS[key] = cut
    return cut


def _find_cut(rows: int, group: int, weight: torch.Tensor, bias: torch.Tensor | None) -> _Cut:
    is_widened = group >= WIDENED_ROWS and _multiplies_as_float32(weight)
    step = _block_columns(weight, is_widened=is_widened)
    if not group < rows <= MAX_ROWS or weight.device.type != "cpu":
        return _Cut(step, group, is_widened, is_settled=True)
    large_step = _large_block_columns(rows, weight, step)
    shapes = _shapes(rows, group, weight, bias, step, large_step, is_widened=is_widened)
    is_proven_now = group >= PROVEN_AT_ONCE_ROWS
    # Every shape is asked for, so that all that lack a proof get one.
    proofs = [PROOFS.prove(shape) if is_proven_now else PROOFS.holds(shape) for shape in shapes]
    is_settled = is_proven_now or all(PROOFS.is_settled(shape) for shape in shapes)
    if all(proofs):
        return _Cut(large_step, rows, is_widened, is_settled)
    return _Cut(step, group, is_widened, is_settled)


def _shapes(  # noqa: PLR0913, PLR0917 - a product, and how it is cut
    rows: int,
    group: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    step: int,
    large_step: int,
    *,
    is_widened: bool,
) -> list[ProductShape]:
    """Return what must be proven before all rows and `large_step` columns may go at once."""
    terms, columns = weight.shape
    widths = {min(step, columns), columns % step or step} if step < columns else {columns}
    return [
        ProductShape(
            rows=rows,
            group=group,
            terms=terms,
            columns=width,
            block_columns=min(large_step, width),
            dtype=weight.dtype,
            is_widened=is_widened,
            is_transposed=weight.stride(0) == 1,
            has_bias=bias is not None,
            is_strided=step < columns,
            offset_bytes=weight.data_ptr() % CACHE_LINE_BYTES,
            threads=torch.get_num_threads(),
        )
        for width in widths
    ]


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
