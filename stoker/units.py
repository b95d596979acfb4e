"""Units: constants and the one place where byte counts, rates and durations become text."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
MB = 1_000_000
GB = 1_000_000_000
"""Rates are given in decimal gigabytes per second, as disks and buses are sold."""


def align_up(value: int, boundary: int) -> int:
    """Return the smallest multiple of `boundary` that is not below `value`."""
    return -(-value // boundary) * boundary


def format_bytes(count: float) -> str:
    """Return e.g. `538.1 MB`: decimal units, one digit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:  # noqa: PLR2004 - the step between decimal units
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_rate(byte_count: float, seconds: float) -> str:
    """Return e.g. `2.31 GB/s`; `-` where no time passed."""
    return f"{byte_count / seconds / GB:.2f} GB/s" if seconds > 0 else "-"


def format_seconds(seconds: float) -> str:
    """Return e.g. `43 ms` or `1.27 s`."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def format_count(count: int, noun: str) -> str:
    """Return e.g. `1 model` or `1,200 models`; for nouns whose plural is an `s` more."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
