"""Where the ranks of a replica meet: sums and gathers over what each of them has computed.

A sum adds the ranks' parts in the order of the ranks, on every rank, from the parts themselves: it has the
same bits everywhere, and a row's don't depend on the rows beside it, which a library's all-reduce doesn't
promise (it may cut the buffer by its length and add each piece in another order). What it costs is that N
parts travel where a ring needs two; in decode steps these are a few KiB, and the time is the way there and
back.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed

from stoker.errors import PeerError

if TYPE_CHECKING:
    from pathlib import Path

LOOPBACK = "lo"
"""Ranks are processes of one host; without a name gloo would look for the host's own address."""

PASS_SECONDS = 300.0
"""Longest wait for another rank's part: it may compute more slowly, but not for ever. The same while weights
arrive: a store reads the files of all ranks in turn, chunk by chunk, so one has them as soon as another."""


class RankMeeting:
    """The ranks of one replica, as one of them sees them. One per process and life.

    Args:
        rank: This process's, from 0.
        ranks: How many there are, 2 or more.
        store_file: Through which they find each other; made here, the same for all.
        device: They compute on: decides how parts travel.

    Raises:
        PeerError: They have not all come within `PASS_SECONDS`.
    """

    def __init__(self, rank: int, ranks: int, *, store_file: Path, device: torch.device) -> None:
        self.rank = rank
        self.ranks = ranks
        self._as_bytes = device.type == "cpu"
        if device.type == "cpu":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        else:
            torch.cuda.set_device(device)
        try:
            distributed.init_process_group(
                "gloo" if device.type == "cpu" else "nccl",
                store=distributed.FileStore(str(store_file), ranks),  # type: ignore[attr-defined]  # documented
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=PASS_SECONDS),
            )
        except (RuntimeError, ValueError) as error:
            raise PeerError(f"rank {rank} did not find the other {ranks - 1} ranks: {error}") from error

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' parts, which have one shape."""
        first, *others = self._parts(part)
        total = first
        for other in others:
            total = total + other
        return total

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """Return all ranks' parts side by side in the last dimension."""
        return torch.cat(self._parts(part), dim=-1)

    def _parts(self, part: torch.Tensor) -> list[torch.Tensor]:
        own = part.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.ranks)]
        if self._as_bytes:  # gloo does not know every dtype
            distributed.all_gather([each.view(torch.uint8) for each in parts], own.view(torch.uint8))
        else:
            distributed.all_gather(parts, own)
        return parts
