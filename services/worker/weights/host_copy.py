"""A copy engine to this process's own memory: for models that the store's pool cannot hold whole.

On the processor weights are the store's memory where they fit. A checkpoint that is larger than the pool
comes through a window of it and has to be copied out, as to a device; here a copy is done when it was asked
for, and nothing has to be locked.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from services.worker.memory import available_bytes
from services.worker.weights.copy_engine import Locked, Mark
from stoker.errors import DoesNotFit
from stoker.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator


class PassedMark:
    """See `Mark`: every copy is done when it was asked for."""

    def is_passed(self) -> bool:
        """See `Mark`."""
        return True


class HostCopyEngine:
    """A `CopyEngine` whose device is the processor."""

    @property
    def device(self) -> torch.device:
        """See `CopyEngine`."""
        return torch.device("cpu")

    def lock(self, address: int, length: int) -> Locked:  # noqa: ARG002 - the protocol's
        """Return that nothing was locked: the processor reads any memory."""
        return Locked.NOT

    def allocate(self, byte_count: int) -> torch.Tensor:
        """See `CopyEngine`; refuses more than is available, for the kernel would kill this process later."""
        free_bytes = available_bytes(self.device)
        if byte_count > free_bytes:
            raise DoesNotFit(
                f"a copy of {format_bytes(byte_count)} does not fit in this host's memory, of which "
                f"{format_bytes(free_bytes)} are available: the store's pool is too small for the model, so "
                "the worker needs memory of its own; raise STOKER_STORE_POOL_BYTES or stop what else runs"
            )
        return torch.empty(byte_count, dtype=torch.uint8)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """See `CopyEngine`."""
        destination.copy_(source)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See `CopyEngine`."""
        yield

    def mark(self) -> Mark:
        """See `CopyEngine`."""
        return PassedMark()

    def join(self, mark: Mark) -> None:
        """Do nothing: a mark is passed when it is made."""

    def synchronize(self) -> None:
        """Do nothing: copies are done."""

    def close(self) -> None:
        """Do nothing: nothing was locked."""
