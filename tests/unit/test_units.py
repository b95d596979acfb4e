"""Units: what people read."""

from __future__ import annotations

import pytest

from stoker.units import align_up, format_bytes, format_count, format_rate, format_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (538_090_000, "538.1 MB"), (2.5e12, "2.5 TB")],
)
def test_bytes_are_shown_in_decimal_units(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("value", "boundary", "aligned"), [(0, 256, 0), (1, 256, 256), (256, 256, 256)])
def test_align_up_never_goes_below_the_value(value: int, boundary: int, aligned: int) -> None:
    assert align_up(value, boundary) == aligned


def test_a_rate_without_time_is_not_a_number() -> None:
    assert format_rate(10, 0) == "-"
    assert format_rate(2_310_000_000, 1) == "2.31 GB/s"


def test_short_times_are_milliseconds() -> None:
    assert (format_seconds(0.0431), format_seconds(1.274)) == ("43 ms", "1.27 s")


def test_one_of_something_is_not_many() -> None:
    assert [format_count(count, "model") for count in (0, 1, 1200)] == ["0 models", "1 model", "1,200 models"]
