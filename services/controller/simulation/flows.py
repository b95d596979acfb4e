"""Bandwidth that transfers share: each link is split evenly, a transfer runs at its slowest link's share.

A checkpoint's way (remote, disk, bus) is a pipeline, so its rate is that of the narrowest stage, not a sum of
times. When a transfer begins or ends, those that share a link with it get another rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Link:
    """A stage that transfers share, e.g. one host's disk."""

    name: str
    bytes_per_second: float
    transfers: dict[Transfer, None] = field(default_factory=dict)
    """Under way, in the order they began."""

    @property
    def queued_bytes(self) -> float:
        """Return what its transfers still have to move, as of their last change of rate."""
        return sum(transfer.left_bytes for transfer in self.transfers)


@dataclass(slots=True, eq=False)
class Transfer:
    """Bytes on their way over some links at once."""

    links: tuple[Link, ...]
    left_bytes: float
    done: Callable[[], None]
    rate: float = 0.0
    since_seconds: float = 0.0
    version: int = 0
    """Raised at every change of rate: an end that was foreseen before it does not come."""


@dataclass(slots=True)
class Flows:
    """All transfers of a simulation.

    Attributes:
        now: The virtual clock, seconds.
        at: Calls something at a moment of it.
    """

    now: Callable[[], float]
    at: Callable[[float, Callable[[], None]], None]

    def begin(self, links: Sequence[Link], byte_count: float, done: Callable[[], None]) -> Transfer:
        """Move `byte_count` over `links`; `done` is called when they have arrived."""
        transfer = Transfer(tuple(links), float(byte_count), done, since_seconds=self.now())
        for link in transfer.links:
            link.transfers[transfer] = None
        self._share(transfer.links, also=transfer)
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        """Give a transfer up; `done` is not called."""
        transfer.version += 1
        self._leave(transfer)

    def left_bytes(self, link: Link) -> float:
        """Return what a link's transfers still have to move now."""
        return sum(self.remaining(each) for each in link.transfers)

    def remaining(self, transfer: Transfer) -> float:
        """Return what a transfer still has to move now, bytes."""
        return max(0.0, transfer.left_bytes - transfer.rate * (self.now() - transfer.since_seconds))

    def _leave(self, transfer: Transfer) -> None:
        for link in transfer.links:
            link.transfers.pop(transfer, None)
        self._share(transfer.links)

    def _share(self, links: Sequence[Link], also: Transfer | None = None) -> None:
        changed = dict.fromkeys(transfer for link in links for transfer in link.transfers)
        if also is not None:
            changed[also] = None
        now = self.now()
        for transfer in changed:
            rate = min(
                (link.bytes_per_second / len(link.transfers) for link in transfer.links), default=float("inf")
            )
            if rate == transfer.rate:
                continue
            transfer.left_bytes -= transfer.rate * (now - transfer.since_seconds)
            transfer.since_seconds = now
            transfer.rate = rate
            transfer.version += 1
            left_seconds = max(0.0, transfer.left_bytes) / rate
            self.at(now + left_seconds, _end(self, transfer, transfer.version))


def _end(flows: Flows, transfer: Transfer, version: int) -> Callable[[], None]:
    def end() -> None:
        if transfer.version != version:
            return
        transfer.version += 1
        transfer.left_bytes = 0.0
        flows._leave(transfer)  # noqa: SLF001 - the same module's other half
        transfer.done()

    return end
