"""A copy engine over CUDA, by torch's public API: `cudaHostRegister`, a stream of its own, events.

Locking: the store's memory is mapped shared and read-only here, so it is registered with
`cudaHostRegisterReadOnly`; a driver or platform without it refuses, and copies go through two page-locked
buffers in turn. A private mapping is never registered: the driver would ask the kernel for writable pages,
which copies every one of them.

`Tensor.copy_(..., non_blocking=True)` is `cudaMemcpyAsync` on the current stream, whatever memory the source
is; from registered memory that is a transfer by the device itself.
"""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, cast

import torch

from services.worker.weights.copy_engine import SEGMENT_BYTES, Locked, Mark, lock_range
from stoker import log
from stoker.errors import DoesNotFit
from stoker.units import MIB, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BUFFER_BYTES = 16 * MIB
BUFFERS = 2

_REGISTER_PORTABLE = 1  # driver_types.h, cudaHostRegister*
_REGISTER_READ_ONLY = 8
_SUCCESS = 0


class CudaMark:
    """See `Mark`."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch.cuda is typed in part
        self.event.record(stream)

    def is_passed(self) -> bool:
        """See `Mark`."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]  # as above


class CudaCopyEngine:
    """A `CopyEngine` to one CUDA device; made in the process that computes there.

    Args:
        device: With an index.
        segment_bytes: Most that is locked in one call.
        can_lock: False: every copy goes through buffers, as where the driver refuses.
        locked: Addresses, begin and end, that this process has page-locked already.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        can_lock: bool = True,
        locked: Iterable[tuple[int, int]] = (),
    ) -> None:
        self._device = device
        self._segment_bytes = segment_bytes
        self._can_lock = can_lock
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # as above
        self._locked: list[tuple[int, int]] = list(locked)
        self._registered: list[int] = []
        self._buffers: deque[tuple[torch.Tensor, CudaMark | None]] = deque()

    @property
    def device(self) -> torch.device:
        """See `CopyEngine`."""
        return self._device

    def lock(self, address: int, length: int) -> Locked:
        """See `CopyEngine`."""
        if not self._can_lock or length == 0:
            return Locked.NOT
        with torch.cuda.device(self._device):
            locked, addresses = lock_range(
                address, length, lock=_register, unlock=_unregister, segment_bytes=self._segment_bytes
            )
            if locked is not Locked.WHOLE:
                self._forget_error()
        if locked is Locked.NOT:
            log.get().warning(
                "arena.lock_refused", byte_count=length, action="loads go through page-locked buffers"
            )
        else:
            self._locked.append((address, address + length))
            self._registered += addresses
        return locked

    def allocate(self, byte_count: int) -> torch.Tensor:
        """See `CopyEngine`."""
        try:
            return torch.empty(byte_count, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(f"{self._device} has no room for {format_bytes(byte_count)}: {error}") from error

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """See `CopyEngine`."""
        if self._is_locked(source):
            with torch.cuda.stream(self._stream):
                destination.copy_(source, non_blocking=True)
            return
        for start in range(0, source.numel(), BUFFER_BYTES):
            end = min(start + BUFFER_BYTES, source.numel())
            self._copy_by_buffer(destination[start:end], source[start:end])

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See `CopyEngine`."""
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Mark:
        """See `CopyEngine`."""
        return CudaMark(self._stream)

    def join(self, mark: Mark) -> None:
        """See `CopyEngine`."""
        torch.cuda.current_stream(self._device).wait_event(cast("CudaMark", mark).event)

    def synchronize(self) -> None:
        """See `CopyEngine`."""
        self._stream.synchronize()

    def close(self) -> None:
        """See `CopyEngine`."""
        self.synchronize()
        for address in self._registered:
            _unregister(address)
        self._registered.clear()
        self._locked.clear()
        self._buffers.clear()

    def _forget_error(self) -> None:
        """Let a kernel's launch report, and so clear, the error that a refusal left behind in the driver."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self._device)

    def _is_locked(self, source: torch.Tensor) -> bool:
        first = source.data_ptr()
        last = first + source.numel()
        return any(start <= first and last <= end for start, end in self._locked)

    def _copy_by_buffer(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        buffer = self._free_buffer()
        part = buffer[: source.numel()]
        part.copy_(source)
        with torch.cuda.stream(self._stream):
            destination.copy_(part, non_blocking=True)
        self._buffers.append((buffer, CudaMark(self._stream)))

    def _free_buffer(self) -> torch.Tensor:
        if len(self._buffers) < BUFFERS:
            return torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
        buffer, mark = self._buffers.popleft()
        if mark is not None:
            mark.event.synchronize()
        return buffer


def _register(address: int, length: int) -> bool:
    flags = _REGISTER_PORTABLE | _REGISTER_READ_ONLY
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # as above
    return int(runtime.cudaHostRegister(address, length, flags)) == _SUCCESS


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]  # as above
