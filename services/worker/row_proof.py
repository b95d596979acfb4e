"""Which larger products give each row the bits of the small ones: tried out, on this host.

A pass multiplies `group` rows at a time, so that a row's bits don't depend on the batch. Often a product of
more rows has the same bits: MKL with one thread makes float32 products of 2 to 15 rows alike, and one product
of 9 rows takes less time than three of 3. Whether it does depends on library, processor, thread count and
shape, so it is proven before it is used: random rows at several positions, compared bit for bit.

Only float32 with one thread: in bfloat16 rounding hides most other orders of summation from samples (a test
with two threads failed that way), and with several threads nothing has been shown yet.

A proof runs when a shape is first asked for with a number of rows, never for one group alone, and so not in
a cold start; it costs about six products of that shape. Results are kept for the life of the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

TRIALS = 3
MAX_PROOFS = 4096
"""Kept at most; a model has some 5 shapes, each with up to 8 row counts."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Key: TypeAlias = tuple[int, tuple[object, ...]]
_PROVEN: dict[Key, bool] = {}


class Product(NamedTuple):
    """A matrix product, and the two ways to make it."""

    group: int
    """Rows of the products that set the bits."""
    weight: torch.Tensor
    """[in, out], on the CPU."""
    bias: torch.Tensor | None
    """[out]."""
    whole: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    """Of rows, weight and bias: makes one product."""
    by_groups: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, int], torch.Tensor]
    """Of rows, weight, bias and group: makes a product for each group of rows."""


def can_prove(weight: torch.Tensor) -> bool:
    """Say whether samples can tell products apart: bfloat16's rounding hides most differences of order."""
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and torch.get_num_threads() == 1


def cut_rows(product: Product, count: int, most: int, *, may_prove: bool) -> list[int]:
    """Cut rows into the largest products proven to give the bits of `group` rows at a time.

    Args:
        product: What is multiplied.
        count: Rows, a multiple of the group.
        most: Rows of the largest product to try.
        may_prove: Whether there is time for a proof; else only what is proven already counts.

    Returns:
        Row counts that sum up to `count`; the group itself where nothing larger is proven.
    """
    group, weight = product.group, product.weight
    shape = (group, product.bias is None, torch.get_num_threads(), weight.data_ptr() % 64, weight.dtype,
             weight.shape, weight.stride())  # fmt: skip
    sizes: list[int] = []
    while count:
        size = max(group, min(count, most - most % group))
        while size > group and not _is_proven(product, (size, shape), may_prove=may_prove):
            size -= group
        sizes.append(size)
        count -= size
    return sizes


def _is_proven(product: Product, key: Key, *, may_prove: bool) -> bool:
    proven = _PROVEN.get(key)
    if proven is None:
        if not may_prove:
            return False
        if len(_PROVEN) >= MAX_PROOFS:
            _PROVEN.clear()
        proven = _PROVEN[key] = prove(product, key[0])
    return proven


def prove(product: Product, rows: int) -> bool:
    """Say whether one product of `rows` rows has the bits of groups, wherever in it a row stands."""
    weight, bias = product.weight, product.bias
    generator = torch.Generator().manual_seed(rows)
    for trial in range(TRIALS):
        x = torch.randn((rows, weight.shape[0]), generator=generator).to(weight.dtype)
        wanted = product.by_groups(x, weight, bias, product.group)
        if int(wanted.count_nonzero()) * 2 < wanted.numel():
            return False  # a weight of zeros proves nothing
        got = product.whole(x.roll(trial, 0), weight, bias)
        if not torch.equal(_bits(got), _bits(wanted.roll(trial, 0))):
            return False
    return True


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(_INTEGERS[x.element_size()])
