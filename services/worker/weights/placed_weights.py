"""A checkpoint's tensors as a model on the processor will use them, before their content is there.

Stored in the dtype that the model computes in, they are the store's memory. All others are memory of this
process, filled stage by stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stoker.attach.tensors import tensors
from stoker.checkpoint.layout import is_padding
from stoker.errors import DoesNotFit
from stoker.models.weights import dominant_dtype

if TYPE_CHECKING:
    from services.worker.weights.arrival_order import ArrivalOrder
    from stoker.attach import Attachment
    from stoker.v1.start_pb2 import TierTransfer


class PlacedWeights:
    """Tensors of one checkpoint; the `Destination` of their arrival.

    Args:
        attachment: The checkpoint.
        order: Its stages.
        dtype: To compute in; None: the one that most of the checkpoint is stored in.

    Attributes:
        transfers: None: nothing leaves the host's memory.
        tensors: By name, tied names too; their content is there once their stage is complete.

    Raises:
        DoesNotFit: There is no memory for what must be copied.
    """

    transfers: tuple[TierTransfer, ...] = ()

    def __init__(self, attachment: Attachment, order: ArrivalOrder, *, dtype: torch.dtype | None) -> None:
        self._attachment = attachment
        self._copies: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(order.stages)]
        stored = {name: tensor for name, tensor in tensors(attachment).items() if not is_padding(name)}
        wanted = dtype or dominant_dtype(stored.values())
        placed: dict[int, torch.Tensor] = {}
        try:
            for name, tensor in stored.items():
                if id(tensor) not in placed:  # tied names share one tensor, and its copy
                    placed[id(tensor)] = self._place(tensor, wanted, order.stage_of[name])
        except RuntimeError as error:
            uri = attachment.checkpoint.uri
            raise DoesNotFit(f"{uri} does not fit in memory as {wanted}: {error}") from error
        self.tensors = {name: placed[id(tensor)] for name, tensor in stored.items()}

    def _place(self, tensor: torch.Tensor, wanted: torch.dtype, stage: int) -> torch.Tensor:
        dtype = wanted if tensor.is_floating_point() else tensor.dtype
        if tensor.dtype == dtype:
            return tensor
        copy = torch.empty(tensor.shape, dtype=dtype)
        self._copies[stage].append((copy, tensor))
        return copy

    def arrived(self, file: int, start: int, end: int) -> None:
        """See `Destination`."""
        self._attachment.map_pages(file, start, end)

    def complete(self, stage: int) -> None:
        """See `Destination`."""
        for copy, stored in self._copies[stage]:
            copy.copy_(stored)
        self._copies[stage].clear()

    def join(self, stage: int) -> None:
        """Do nothing: a stage that is complete can be used at once."""
