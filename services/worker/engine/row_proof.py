"""Which larger matrix products give each row the bits that a small one gives it, found out on this host.

A library sums a row's products in an order that depends on the kernel it picks for the row count, and on
nothing else: not on the numbers. So whether two row counts sum alike can be asked with chosen numbers. Here
each term has a counterpart of the opposite sign somewhere else in the row: the exact result is zero, and what
comes out is nothing but the rounding errors of the partial sums, the fingerprint of their order. Magnitudes
span 2**24, so that bfloat16, whose products are exact in float32, leaves such errors too, and its rounding of
the result hides none of them. Two orders that differ agree in a single element at times, but not in a whole
tile of them; ordinary numbers, as samples, would leave most differences unseen in bfloat16.

A shape (rows, terms, columns of a block, ...) is proven once in a process, between two engine steps; until
then, and where the proof fails, products stay small. Either way the bits are the same, so workers may differ
in what they have proven.

Shapes: R rows, K terms, N columns.
"""

# ruff: noqa: N803, N806 - tensors carry shape suffixes

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_ROWS = 256
"""Larger products gain little more."""
MAX_SHAPES = 1024
"""Remembered or waiting at most; beyond, products stay small."""
_EXPONENTS = 6
"""Factors' magnitudes lie within 2 to the power of plus or minus this, times a normal number."""
_ALIGNMENT_BYTES = 64
_DISTINCT = 64
"""Different rows and columns of chosen numbers; then they repeat: making them costs more than products."""


@dataclass(frozen=True, slots=True)
class ProductShape:
    """All that a library may choose a kernel by."""

    rows: int
    group: int
    """Rows of the small products whose bits count."""
    terms: int
    columns: int
    """That a small product covers."""
    block_columns: int
    """That a large product covers: so many pieces make up `columns`."""
    dtype: torch.dtype
    """Of rows and weight, before `is_widened`."""
    is_widened: bool
    """Rows, weight and result of the products are float32 copies."""
    is_transposed: bool
    """The weight is stored as [columns, terms]."""
    has_bias: bool
    is_strided: bool
    """The product is written into some columns of a wider tensor."""
    offset_bytes: int
    """Of the weight's first byte from a cache line's start."""
    threads: int


class RowProofs:
    """What was proven in this process. One thread at a time."""

    def __init__(self) -> None:
        self._proven: dict[ProductShape, bool] = {}
        self._wanted: dict[ProductShape, None] = {}

    def holds(self, shape: ProductShape) -> bool:
        """Say whether one product of `rows` rows is proven to equal small ones; if not known, want it."""
        known = self._proven.get(shape)
        if known is None:
            if not self._is_full():
                self._wanted[shape] = None
            return False
        return known

    def is_settled(self, shape: ProductShape) -> bool:
        """Say whether `holds` will not change its mind."""
        return shape in self._proven or (shape not in self._wanted and self._is_full())

    def _is_full(self) -> bool:
        return len(self._proven) + len(self._wanted) >= MAX_SHAPES

    def prove_next(self) -> bool:
        """Try one shape that was wanted; return False if there is none. Milliseconds."""
        if not self._wanted:
            return False
        shape = next(iter(self._wanted))
        del self._wanted[shape]
        self._proven[shape] = sums_alike(shape)
        return True


def sums_alike(shape: ProductShape) -> bool:
    """Say whether each row of the large product has the bits that the small products give it."""
    generator = torch.Generator().manual_seed(shape.terms)
    order = torch.randperm(shape.terms, generator=generator)
    half = shape.terms // 2
    one, other = order[:half], order[half : 2 * half]
    some_rows = _spread((_DISTINCT, shape.terms), shape.dtype, generator)
    some_columns = _spread((_DISTINCT, shape.terms), shape.dtype, generator)
    some_rows[:, other] = -some_rows[:, one]
    some_columns[:, other] = some_columns[:, one]
    some_rows[:, order[2 * half :]] = 0
    rows_RK = some_rows[torch.arange(shape.rows) % _DISTINCT]
    weight_NK = some_columns[torch.arange(shape.columns) % _DISTINCT]
    weight_KN = _placed(weight_NK, shape)
    bias = _spread((shape.columns,), shape.dtype, generator) * 2.0**-12 if shape.has_bias else None
    if shape.is_widened:
        rows_RK, weight_KN = rows_RK.float(), weight_KN.float()
        bias = None if bias is None else bias.float()
    large, small = _target(shape), _target(shape)
    for left in range(0, shape.columns, shape.block_columns):
        block = slice(left, left + shape.block_columns)
        product(rows_RK, weight_KN[:, block], None if bias is None else bias[block], large[:, block])
    for top in range(0, shape.rows, shape.group):
        end = top + shape.group
        product(rows_RK[top:end], weight_KN, bias, small[top:end])
    return torch.equal(large, small)


def product(
    rows_RK: torch.Tensor,
    weight_KN: torch.Tensor,
    bias: torch.Tensor | None,
    out_RN: torch.Tensor,
) -> None:
    """Write rows @ weight + bias to `out_RN`: the one call whose bits are at stake."""
    if bias is None:
        torch.mm(rows_RK, weight_KN, out=out_RN)
    else:
        torch.addmm(bias, rows_RK, weight_KN, out=out_RN)


def _spread(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return normal numbers times powers of two."""
    powers = torch.randint(-_EXPONENTS, _EXPONENTS + 1, size, generator=generator)
    return torch.ldexp(torch.randn(size, generator=generator), powers).to(dtype)


def _placed(weight_NK: torch.Tensor, shape: ProductShape) -> torch.Tensor:
    """Return the weight as [terms, columns], stored like the model's own."""
    stored = weight_NK if shape.is_transposed else weight_NK.t()
    size_bytes = stored.numel() * stored.element_size()
    memory = torch.empty(size_bytes + 2 * _ALIGNMENT_BYTES, dtype=torch.uint8)
    start = (shape.offset_bytes - memory.data_ptr()) % _ALIGNMENT_BYTES
    placed = memory[start : start + size_bytes].view(stored.dtype).view(stored.shape)
    placed.copy_(stored)
    return placed.t() if shape.is_transposed else placed


def _target(shape: ProductShape) -> torch.Tensor:
    width = 2 * shape.columns if shape.is_strided else shape.columns
    dtype = torch.float32 if shape.is_widened else shape.dtype
    return torch.empty((shape.rows, width), dtype=dtype)[:, : shape.columns]
