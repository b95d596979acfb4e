"""Locking in pieces, and the fake copy engine against the suite that CUDA's must pass too."""

from __future__ import annotations

import pytest

from services.worker.weights.copy_engine import Locked, lock_range, segments
from tests.copy_engines.fake import FakeCopyEngine
from tests.copy_engines.suite import CopyEngineSuite


class TestFakeCopyEngine(CopyEngineSuite):
    """The fake keeps the contract."""

    @pytest.fixture
    def engine(self) -> FakeCopyEngine:
        """Return a fake that locks everything."""
        return FakeCopyEngine()


class Driver:
    """Locks pieces up to a length, and so many of them."""

    def __init__(self, longest: int, most: int = 1000) -> None:
        self.longest = longest
        self.most = most
        self.held: dict[int, int] = {}

    def lock(self, address: int, length: int) -> bool:
        """Lock a piece, if it can be."""
        if length > self.longest or len(self.held) >= self.most:
            return False
        self.held[address] = length
        return True

    def unlock(self, address: int) -> None:
        """Take it back."""
        del self.held[address]


def locked_by(driver: Driver, length: int, segment: int = 64) -> tuple[Locked, list[int]]:
    return lock_range(1000, length, lock=driver.lock, unlock=driver.unlock, segment_bytes=segment)


def test_segments_cover_a_range_without_gaps() -> None:
    assert segments(1000, 150, segment_bytes=64) == [(1000, 64), (1064, 64), (1128, 22)]
    assert segments(1000, 64, segment_bytes=64) == [(1000, 64)]


def test_a_range_is_locked_whole_where_that_is_allowed() -> None:
    assert locked_by(Driver(longest=64), 64) == (Locked.WHOLE, [1000])


def test_a_range_longer_than_a_segment_is_never_tried_whole() -> None:
    driver = Driver(longest=10**9)

    assert locked_by(driver, 130) == (Locked.SEGMENTS, [1000, 1064, 1128])
    assert driver.held == {1000: 64, 1064: 64, 1128: 2}


def test_smaller_segments_are_tried_where_large_ones_are_refused() -> None:
    driver = Driver(longest=16)

    assert locked_by(driver, 64)[0] is Locked.SEGMENTS
    assert sum(driver.held.values()) == 64
    assert set(driver.held.values()) == {16}


def test_what_cannot_be_locked_as_a_whole_is_not_locked_in_part() -> None:
    driver = Driver(longest=1000, most=2)

    assert locked_by(driver, 64 * 3) == (Locked.NOT, [])
    assert driver.held == {}
