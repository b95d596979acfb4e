"""A paced tier is one link of exactly its speed."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from services.store.reading.pace import Link, Pace, PacedTier
from services.store.settings import StoreSettings
from stoker.checkpoint.reading import PAGE_CACHE, ReadPart


def test_reads_at_once_share_the_rate() -> None:
    link = Link(100.0)

    assert [link.done_seconds(50, 10.0) for _ in range(4)] == [10.5, 11.0, 11.5, 12.0]


def test_time_in_which_nothing_was_read_gives_no_burst() -> None:
    link = Link(100.0)
    link.done_seconds(50, 0.0)

    assert link.done_seconds(50, 100.0) == 100.5


def _part(tier: str, byte_count: int, *, began_seconds: float = 0.0) -> ReadPart:
    return ReadPart(
        tier=tier, byte_count=byte_count, began_seconds=began_seconds, ended_seconds=began_seconds + 1e-3
    )


def test_bytes_from_the_page_cache_count_as_the_disks() -> None:
    """They began long ago, so nothing is waited for."""
    pace = Pace({PacedTier.DISK: 1000.0})

    (held,) = pace.hold([_part(PAGE_CACHE, 500)])

    assert held.ended_seconds == 0.5
    assert held.tier == PAGE_CACHE


def test_tiers_without_a_rate_or_at_0_are_as_fast_as_they_go() -> None:
    pace = Pace({PacedTier.REMOTE: 0.0, PacedTier.PEER: 1.0})
    parts = [_part("remote", 10**9), _part("disk", 10**9)]

    assert pace.hold(parts) == parts


def test_a_read_that_is_slower_by_itself_is_not_slowed_further() -> None:
    pace = Pace({PacedTier.DISK: 1e9})
    part = _part("disk", 1000)

    assert pace.hold([part]) == [part]


def test_a_tier_nobody_knows_and_a_rate_below_0_are_refused() -> None:
    with pytest.raises(ValidationError, match="disk"):
        StoreSettings(paced_bytes_per_second={"disc": 1})
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        StoreSettings(paced_bytes_per_second={"disk": -1})
