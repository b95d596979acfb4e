"""How long a peer may take, and how many there may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of what is done with peers and for them.

    Attributes:
        max_links: Peers dialled, and control connections accepted.
        max_senders: Data connections accepted; each has a thread.
        dial_seconds: To connect and to be greeted.
        silence_seconds: A link without a sign of life for so long is broken; signs come every quarter of it.
        stall_seconds: A chunk that moves no byte for so long is given up, by either end.
        slowest_bytes_per_second: A chunk that comes slower than this is given up; when several are fetched
            at a time, each may take as much longer.
        slow_factor: So is one that takes so many times what chunks usually take (`stall_seconds` at least).
        arriving_factor: A chunk that is on its way to the peer itself may take so many times longer.
        pause_seconds: And may bring no byte for so long, while the peer shows signs of life.
        drop_seconds: A peer that was dead or slow is not asked again for so long; a liar never.
        idle_seconds: A data connection that asks nothing for so long is closed.
        first_retry_seconds: Before a peer that can't be reached is dialled again; doubles.
        longest_retry_seconds: At most.
    """

    max_links: int = 256
    max_senders: int = 64
    dial_seconds: float = 3.0
    silence_seconds: float = 8.0
    stall_seconds: float = 5.0
    slowest_bytes_per_second: float = 1_000_000.0
    slow_factor: float = 8.0
    arriving_factor: float = 16.0
    pause_seconds: float = 20.0
    drop_seconds: float = 30.0
    idle_seconds: float = 60.0
    first_retry_seconds: float = 0.1
    longest_retry_seconds: float = 5.0
