"""Who gets room on the disk, and who goes for it."""

from __future__ import annotations

import pytest

from services.store.disk_cache.quota import Copy, NoRoom, Room, make_room
from services.store.pool.eviction import Uses


def copy(key: str, size: int, *, uses: float = 1.0, **facts) -> Copy:
    defaults = {"reload_seconds": 1.0, "held": False}
    return Copy(key=key, size_bytes=size, uses=Uses(count=uses, at_seconds=0.0), **defaults | facts)


def decide(need: int, *copies: Copy, quota: int = 100):
    return make_room(copies, need_bytes=need, quota_bytes=quota, now_seconds=0.0)


@pytest.mark.parametrize(
    ("outcome", "evicted"),
    [
        (decide(100), ()),
        (decide(40, copy("a", 60)), ()),
        (decide(41, copy("a", 60)), ("a",)),
        (decide(50, copy("often", 50, uses=9.0), copy("rarely", 50)), ("rarely",)),
        (decide(50, copy("dear", 50, reload_seconds=9.0), copy("cheap", 50)), ("cheap",)),
        (decide(50, copy("old", 50, uses=9.0, superseded=True), copy("new", 50)), ("old",)),
        (decide(50, copy("pinned", 50, held=True), copy("free", 50, uses=99.0)), ("free",)),
    ],
)
def test_the_cheapest_to_lose_go_first(outcome, evicted):
    assert outcome == Room(evict=evicted)


def test_what_is_held_is_never_deleted():
    outcome = decide(50, copy("a", 60, held=True), copy("b", 20))

    assert isinstance(outcome, NoRoom)
    assert "60 B" in outcome.reason


def test_what_is_larger_than_the_cache_gets_no_room_and_nobody_goes():
    outcome = decide(101, copy("a", 60))

    assert isinstance(outcome, NoRoom)
    assert "STOKER_STORE_CACHE_BYTES" in outcome.reason
