"""Which bytes must be there before which part of a model may run. Pure.

Stages follow the order of execution: what feeds the model, each decoder layer, what comes after them. A
stage is there when every tensor of it, and of those before it, is: so a checkpoint whose files hold the
tensors in another order (shards in place) only waits longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stoker.attach import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalOrder:
    """The stages of a checkpoint's arrival.

    Attributes:
        stage_of: Stage of each stored tensor, by name; stages count from 0.
        needs_bytes: For each stage how many bytes of each file, from its start, must be there.
    """

    stage_of: Mapping[str, int]
    needs_bytes: tuple[tuple[int, ...], ...]

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.needs_bytes)


def arrival_order(tensors: Iterable[Tensor], *, files: int) -> ArrivalOrder:
    """Return the stages of a checkpoint.

    Args:
        tensors: In execution order.
        files: Number of its files.
    """
    stage_of: dict[str, int] = {}
    needs_bytes: list[tuple[int, ...]] = []
    reached = [0] * files
    for stage, (_, members) in enumerate(groupby(tensors, key=lambda tensor: tensor.layer)):
        for tensor in members:
            stage_of[tensor.name] = stage
            reached[tensor.file] = max(reached[tensor.file], tensor.offset + tensor.nbytes)
        needs_bytes.append(tuple(reached))
    return ArrivalOrder(stage_of=stage_of, needs_bytes=tuple(needs_bytes))
