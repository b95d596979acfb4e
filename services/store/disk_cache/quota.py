"""Whether a checkpoint gets room in the disk cache, and whose copies go for it. Pure.

As in the pool: what goes is cheapest by the cost to bring it back times the likelihood of its use; pinned
copies and those being read stay. A checkpoint that gets no room is loaded all the same, past the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.store.pool.eviction import Occupant, Uses, choose_victims
from stoker.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A copy on disk, whole or under way.

    Attributes:
        key: Name of its folder.
        size_bytes: Room that is set aside for it: all its weights.
        reload_seconds: What bringing it back would take.
        uses: How it has been used.
        held: Pinned or being read or written: stays.
        superseded: The origin has another revision by now.
    """

    key: str
    size_bytes: int
    reload_seconds: float
    uses: Uses
    held: bool
    superseded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """There is room once these copies, by key, are gone."""

    evict: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRoom:
    """There is none; says why."""

    reason: str


def make_room(
    copies: Sequence[Copy], *, need_bytes: int, quota_bytes: int, now_seconds: float
) -> Room | NoRoom:
    """Decide whether `need_bytes` more fit into the quota, and who goes.

    Args:
        copies: All that take room now.
        need_bytes: Of the new one.
        quota_bytes: Of the cache.
        now_seconds: On the clock of the copies' uses.
    """
    if need_bytes > quota_bytes:
        return NoRoom(
            reason=f"it has {format_bytes(need_bytes)}, the disk cache may hold {format_bytes(quota_bytes)}; "
            "raise STOKER_STORE_CACHE_BYTES, or free room on its disk and start the store again"
        )
    missing = sum(copy.size_bytes for copy in copies) + need_bytes - quota_bytes
    occupants = [
        Occupant(
            key=number,
            chunks=copy.size_bytes,
            reload_seconds=copy.reload_seconds,
            uses=copy.uses,
            held=copy.held,
            superseded=copy.superseded,
        )
        for number, copy in enumerate(copies)
    ]
    victims = choose_victims(occupants, need_chunks=missing, now_seconds=now_seconds)
    if victims is None:
        held = sum(copy.size_bytes for copy in copies if copy.held)
        return NoRoom(
            reason=f"{format_bytes(held)} of the disk cache's {format_bytes(quota_bytes)} are pinned or in "
            "use; unpin or evict others (`stoker cache ls`)"
        )
    return Room(evict=tuple(copies[number].key for number in victims))
