"""How a tensor is cut for tensor-parallel ranks, and its bytes dealt out to them. Pure.

A cut splits one dimension into `blocks` equal blocks and each block into one piece per rank; rank r gets the
r-th piece of every block. One block is a plain shard; two are what a fused gate-and-up projection needs.
In row-major order that makes the tensor a sequence of equally long units which go to ranks 0, 1, … N-1,
0, 1, … in turn, whatever the dimension: that is all that dealing has to know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.checkpoint.dtypes import DTYPE_BITS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LONG_UNIT_BYTES = 64 * 1024
"""From here on units are dealt one by one; shorter ones by rows of one unit for each rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A cut of one tensor.

    Attributes:
        dim: Which dimension, counted from 0.
        blocks: Into how many equal blocks the dimension falls before each is cut.
    """

    dim: int
    blocks: int = 1

    def divides(self, shape: tuple[int, ...], ranks: int) -> bool:
        """Say whether every rank gets equally much."""
        return self.dim < len(shape) and shape[self.dim] % (self.blocks * ranks) == 0

    def piece_shape(self, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
        """Return what one rank holds of a tensor that the cut divides."""
        return (*shape[: self.dim], shape[self.dim] // ranks, *shape[self.dim + 1 :])

    def whole_shape(self, piece: tuple[int, ...], ranks: int) -> tuple[int, ...]:
        """Return the shape of the tensor of which one rank holds `piece`."""
        return (*piece[: self.dim], piece[self.dim] * ranks, *piece[self.dim + 1 :])

    def unit_bytes(self, shape: tuple[int, ...], dtype: str, ranks: int) -> int | None:
        """Return the length of a unit, or None where one would end inside a byte.

        Args:
            shape: Of the whole tensor, which the cut divides.
            dtype: A key of `DTYPE_BITS`.
            ranks: How many.
        """
        bits = shape[self.dim] // (self.blocks * ranks) * math.prod(shape[self.dim + 1 :]) * DTYPE_BITS[dtype]
        return None if bits % 8 else bits // 8


def deal(parts: Iterable[memoryview], *, unit_bytes: int, ranks: int) -> Iterator[tuple[int, memoryview]]:
    """Yield ranks and their bytes, in each rank's order; holds one part and at most one row of units.

    Args:
        parts: A tensor's bytes in order; each is used up before the next one is asked for.
        unit_bytes: See `Cut.unit_bytes`.
        ranks: How many.
    """
    if unit_bytes >= _LONG_UNIT_BYTES:
        yield from _deal_units(parts, unit_bytes, ranks)
    elif unit_bytes:
        yield from _deal_rows(parts, unit_bytes, ranks)


def _deal_units(parts: Iterable[memoryview], unit_bytes: int, ranks: int) -> Iterator[tuple[int, memoryview]]:
    position = 0
    for part in parts:
        rest = part.cast("B")
        while rest:
            unit, inside = divmod(position, unit_bytes)
            piece = rest[: unit_bytes - inside]
            yield unit % ranks, piece
            position += len(piece)
            rest = rest[len(piece) :]


def _deal_rows(parts: Iterable[memoryview], unit_bytes: int, ranks: int) -> Iterator[tuple[int, memoryview]]:
    import numpy as np  # noqa: PLC0415 - pure Python would take a loop per unit

    row_bytes = unit_bytes * ranks
    carried = b""
    for part in parts:
        data = part.cast("B")
        if carried:
            missing = row_bytes - len(carried)
            head = carried + bytes(data[:missing])
            data = data[missing:]
            if len(head) < row_bytes:
                carried = head
                continue
            yield from enumerate(_columns(np.frombuffer(head, np.uint8), unit_bytes, ranks))
        whole = len(data) // row_bytes * row_bytes
        carried = bytes(data[whole:])
        if whole:
            yield from enumerate(_columns(np.frombuffer(data[:whole], np.uint8), unit_bytes, ranks))
    if carried:
        raise AssertionError("the tensor did not hold whole rows of units")


def _columns(rows: object, unit_bytes: int, ranks: int) -> Iterator[memoryview]:
    """Yield what each rank gets of whole rows, an array of bytes."""
    import numpy as np  # noqa: PLC0415 - as above

    table = np.asarray(rows).reshape(-1, ranks, unit_bytes)
    for rank in range(ranks):
        yield np.ascontiguousarray(table[:, rank]).reshape(-1).data
