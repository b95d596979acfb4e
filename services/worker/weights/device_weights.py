"""A checkpoint's tensors in a device's memory: one allocation per file, filled piece by piece as they arrive.

Tensors are views of it. Only what starts where its elements may not (possible in place) or is stored in
another dtype than the model computes in has memory of its own, filled on the device.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from stoker.checkpoint.layout import is_padding
from stoker.checkpoint.torch_views import shaped, torch_dtype, torch_shape
from stoker.models.weights import dominant_dtype
from stoker.v1.start_pb2 import TierTransfer

if TYPE_CHECKING:
    from services.worker.weights.arrival_order import ArrivalOrder
    from services.worker.weights.copy_engine import CopyEngine, Mark
    from services.worker.weights.pool_lock import LockedPool
    from stoker.attach import Attachment, Tensor

DEVICE = "device"
"""The stage's name, in transfers and bandwidths."""


class DeviceWeights:
    """Tensors of one checkpoint on a device; the `Destination` of their arrival.

    Args:
        attachment: The checkpoint; let go once all of it is on the device.
        order: Its stages.
        engine: Copies to the device.
        dtype: To compute in; None: the one that most of the checkpoint is stored in.
        pool: The store's memory, page-locked before; None: it is copied from as it is mapped.

    Attributes:
        tensors: By name, tied names too; their content is there once their stage was joined.
        transfers: What the copies took, once all are done.

    Raises:
        DoesNotFit: The device has no room.
    """

    def __init__(
        self,
        attachment: Attachment,
        order: ArrivalOrder,
        engine: CopyEngine,
        *,
        dtype: torch.dtype | None,
        pool: LockedPool | None = None,
    ) -> None:
        self.transfers: tuple[TierTransfer, ...] = ()
        self._attachment: Attachment | None = attachment
        self._engine = engine
        self._pool = pool
        self._files = [engine.allocate(attachment.file_bytes(file)) for file in range(attachment.file_count)]
        self._casts: list[list[tuple[torch.Tensor, Tensor]]] = [[] for _ in range(order.stages)]
        self._marks: list[Mark | None] = [None] * order.stages
        self._copied_bytes = 0
        self._busy_seconds = 0.0
        places = {name: place for name, place in attachment.tensors.items() if not is_padding(name)}
        wanted = dtype or dominant_dtype(
            torch.empty(place.shape, dtype=torch_dtype(place.dtype, name=name), device="meta")
            for name, place in places.items()
        )
        self.tensors = {
            name: self._place(place, wanted, order.stage_of[name]) for name, place in places.items()
        }
        for stored, *others in attachment.tied:
            self.tensors.update(dict.fromkeys(others, self.tensors[stored]))

    def _place(self, place: Tensor, wanted: torch.dtype, stage: int) -> torch.Tensor:
        stored = torch_dtype(place.dtype, name=place.name)
        dtype = wanted if stored.is_floating_point else stored
        if dtype == stored and place.offset % stored.itemsize == 0 and place.nbytes:
            return self._stored(place)
        shape = torch_shape(place.dtype, place.shape, name=place.name)
        own = torch.empty(shape, dtype=dtype, device=self._engine.device)
        if place.nbytes:
            self._casts[stage].append((own, place))
        return own

    def _stored(self, place: Tensor) -> torch.Tensor:
        raw = self._files[place.file][place.offset : place.offset + place.nbytes]
        return shaped(raw, dtype=place.dtype, shape=place.shape, name=place.name)

    def arrived(self, file: int, start: int, end: int) -> None:
        """See `Destination`."""
        if self._attachment is None:
            raise AssertionError("bytes arrived after the last stage was complete")
        began_seconds = time.monotonic()
        byte_count = end - start
        for source in self._sources(self._attachment, file, start, end):
            self._engine.copy(self._files[file][start : start + source.numel()], source)
            start += source.numel()
        if self._attachment.window_bytes is not None:
            self._engine.synchronize()  # other bytes come into their place; the store reads on meanwhile
        self._copied_bytes += byte_count
        self._busy_seconds += time.monotonic() - began_seconds

    def _sources(self, attachment: Attachment, file: int, start: int, end: int) -> list[torch.Tensor]:
        locked = None if self._pool is None else self._pool.sources(attachment, file, start, end)
        if locked is not None:
            return locked
        return [torch.frombuffer(attachment.buffer(file, start, end - start), dtype=torch.uint8)]

    def complete(self, stage: int) -> None:
        """See `Destination`; after the last stage the checkpoint's place in the pool is given up."""
        with self._engine.computing():
            for own, place in self._casts[stage]:
                own.copy_(self._stored(place))
        self._casts[stage].clear()
        self._marks[stage] = self._engine.mark()
        if stage == len(self._marks) - 1:
            self._finish()

    def join(self, stage: int) -> None:
        """Make what this thread asks the device for wait for a stage that is complete."""
        mark = self._marks[stage]
        if mark is not None:
            self._engine.join(mark)

    def _finish(self) -> None:
        began_seconds = time.monotonic()
        self._engine.synchronize()
        self._busy_seconds += time.monotonic() - began_seconds
        moved = TierTransfer(tier=DEVICE, bytes=self._copied_bytes, seconds=self._busy_seconds)
        self.transfers = (moved,)
        self._attachment = None  # its place in the pool is free for others
