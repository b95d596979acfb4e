"""What is learnt from reads."""

from __future__ import annotations

import pytest

from services.store.reading.bandwidth import SAMPLE_BYTES, Moved, RunningRates, moved_by_tier
from stoker.checkpoint.reading import ReadPart


def part(began: float, ended: float, *, count: int = 100, tier: str = "disk") -> ReadPart:
    return ReadPart(tier=tier, byte_count=count, began_seconds=began, ended_seconds=ended)


def test_time_that_reads_share_counts_once():
    moved = moved_by_tier([part(0, 2), part(1, 3), part(5, 6), part(5.2, 5.4)])

    assert moved == (Moved(tier="disk", byte_count=400, seconds=4.0),)


def test_tiers_are_told_apart():
    moved = moved_by_tier([part(0, 2), part(0, 1, tier="page_cache", count=7)])

    assert moved == (
        Moved(tier="disk", byte_count=100, seconds=2.0),
        Moved(tier="page_cache", byte_count=7, seconds=1.0),
    )


def test_one_hiccup_does_not_move_the_estimate():
    rates = RunningRates()
    for at in range(4):
        rates.add([part(at, at + 0.5, count=SAMPLE_BYTES)])
    rates.add([part(10, 70, count=SAMPLE_BYTES)])

    assert rates.bytes_per_second("disk") == pytest.approx(2 * SAMPLE_BYTES)


def test_nothing_is_claimed_about_a_tier_that_never_moved_anything():
    assert RunningRates().bytes_per_second("disk") is None


def test_a_first_small_load_gives_a_first_estimate():
    rates = RunningRates()
    rates.add([part(0, 1, count=10)])
    rates.flush()

    assert rates.bytes_per_second("disk") == pytest.approx(10)
    assert rates.tiers() == ("disk",)


def test_reads_that_run_beside_those_of_the_sample_before_do_not_slow_the_estimate():
    rates = RunningRates()
    quarter = SAMPLE_BYTES // 4
    for at in range(40):  # four threads: a read ends every second and takes four
        rates.add([part(at, at + 4, count=quarter)])

    assert rates.bytes_per_second("disk") == pytest.approx(quarter)
