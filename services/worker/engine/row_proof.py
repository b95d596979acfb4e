"""Which larger matrix products give each row the bits that a small one gives it, found out on this host.

A library sums a row's products in an order that depends on the kernel it picks for the row count, and on
nothing else: not on the numbers. So whether two row counts sum alike can be asked with chosen numbers. Here
each term has a counterpart of the opposite sign somewhere else in the row: the exact result is zero, and what
comes out is nothing but the rounding errors of the partial sums, the fingerprint of their order. Magnitudes
span 2**24, so that bfloat16, whose products are exact in float32, leaves such errors too, and its rounding of
the result hides none of them. Two orders that differ agree in a single element at times, but not in a whole
tile of them; ordinary numbers, as samples, would leave most differences unseen in bfloat16.

A shape (rows, terms, columns of a block, ...) is proven once in a process; until then, and where the proof
fails, products stay small. Either way the bits are the same, so workers may differ in what they have proven.
Decode passes want a proof and get it between two engine steps. Prefill passes prove at once: a proof takes
about as long as the larger product saves in two layers.

Shapes: R rows, K terms, N columns.
"""

# ruff: noqa: N803, N806 - tensors carry shape suffixes

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache

import torch

MAX_ROWS = 256
"""Larger products gain little more."""
MAX_SHAPES = 1024
"""Remembered or waiting at most; beyond, products stay small."""
_EXPONENTS = 6
"""Factors' magnitudes lie within 2 to the power of plus or minus this, times a normal number."""
_REMEMBERED_TERMS = 8
"""Chosen numbers are kept for so many widths: those of one model, whatever the row count."""
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
    """What was proven in this process. `prove` may be called by any thread, the rest by the engine's."""

    def __init__(self) -> None:
        self._proven: dict[ProductShape, bool] = {}
        self._wanted: dict[ProductShape, None] = {}
        self._proving = threading.Lock()

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
        self.prove(shape)
        return True

    def prove(self, shape: ProductShape) -> bool:
        """Say whether one product of `rows` rows equals small ones; try it now if it is not known.

        Takes milliseconds, and those of a proof that another thread is at. A shape beyond what is remembered
        is not tried.
        """
        with self._proving:
            known = self._proven.get(shape)
            if known is None:
                if len(self._proven) >= MAX_SHAPES:
                    return False
                known = self._proven[shape] = sums_alike(shape)
            return known


@torch.inference_mode()
def sums_alike(shape: ProductShape) -> bool:
    """Say whether each row of the large product has the bits that the small products give it."""
    some_rows, some_columns = _chosen_numbers(shape.terms, shape.dtype)
    rows_RK = some_rows[torch.arange(shape.rows) % _DISTINCT]
    weight_KN = _placed(some_columns, shape)
    generator = torch.Generator().manual_seed(shape.columns)
    bias = _spread((shape.columns,), generator).to(shape.dtype) * 2.0**-12 if shape.has_bias else None
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


@lru_cache(_REMEMBERED_TERMS)
def _chosen_numbers(terms: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and columns of a weight, [_DISTINCT, terms] each, whose exact products are zero."""
    generator = torch.Generator().manual_seed(terms)
    half = terms // 2
    left_over = torch.zeros((_DISTINCT, terms % 2))
    rows, columns = _spread((2, _DISTINCT, half), generator)
    places = torch.randperm(terms, generator=generator)
    return (
        torch.cat((rows, -rows, left_over), 1).index_select(1, places).to(dtype),
        torch.cat((columns, columns, left_over + 1), 1).index_select(1, places).to(dtype),
    )


def _spread(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return normal numbers times powers of two."""
    powers = 2.0 ** torch.arange(-_EXPONENTS, _EXPONENTS + 1)
    chosen = torch.randint(len(powers), (size[-1],), generator=generator)
    return torch.randn(size, generator=generator) * powers[chosen]


def _placed(some_columns: torch.Tensor, shape: ProductShape) -> torch.Tensor:
    """Return a weight of these columns, [terms, columns], stored like the model's own."""
    size = (shape.columns, shape.terms) if shape.is_transposed else (shape.terms, shape.columns)
    size_bytes = shape.columns * shape.terms * some_columns.element_size()
    memory = torch.empty(size_bytes + 2 * _ALIGNMENT_BYTES, dtype=torch.uint8)
    start = (shape.offset_bytes - memory.data_ptr()) % _ALIGNMENT_BYTES
    placed = memory[start : start + size_bytes].view(some_columns.dtype).view(size)
    weight_NK = placed if shape.is_transposed else placed.t()
    for part in torch.split(weight_NK, _DISTINCT):
        part.copy_(some_columns[: len(part)])
    return weight_NK.t()


def _target(shape: ProductShape) -> torch.Tensor:
    width = 2 * shape.columns if shape.is_strided else shape.columns
    dtype = torch.float32 if shape.is_widened else shape.dtype
    return torch.empty((shape.rows, width), dtype=dtype)[:, : shape.columns]
