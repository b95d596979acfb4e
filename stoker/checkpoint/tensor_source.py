"""What a conversion asks of a checkpoint it reads, whatever its format."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from stoker.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stoker.checkpoint.plan import PlannedTensor

SLICE_BYTES = 4 * MIB
"""What is in memory of one tensor at a time; a multiple of every element's size."""


class TensorSource(AbstractContextManager["TensorSource"], Protocol):
    """A checkpoint to be converted; a context manager that frees what it holds."""

    tensors: dict[str, PlannedTensor]
    """Every stored tensor, by name."""

    tied_groups: tuple[tuple[str, ...], ...]
    """Names already known to share a stored tensor; only the first of a group is in `tensors`."""

    shared_groups: tuple[tuple[str, ...], ...]
    """Names in `tensors` that lie on the same memory in the source."""

    def read(self, name: str) -> Iterator[memoryview]:
        """Yield the tensor's bytes in order, at most `SLICE_BYTES` each, valid until the next one."""
        ...

    def small_files(self) -> dict[str, bytes]:
        """Return configuration, tokenizer and chat template, by name."""
        ...
