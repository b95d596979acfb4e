"""What a benchmark's command line accepts: numbers out of range are refused before anything is measured."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """Return a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: It is none; the message says what was given.
    """
    return _at_least(1, text)


def several(text: str) -> int:
    """Return a whole number of at least 2, for what has quantiles; raises as `positive` does."""
    return _at_least(2, text)


def not_negative(text: str) -> int:
    """Return a whole number of at least 0; raises as `positive` does."""
    return _at_least(0, text)


def positive_float(text: str) -> float:
    """Return a finite number above 0; raises as `positive` does."""
    number = _float(text)
    if not (number > 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return number


def not_negative_float(text: str) -> float:
    """Return a finite number of at least 0; raises as `positive` does."""
    number = _float(text)
    if not (number >= 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return number


def positives(text: str) -> list[int]:
    """Return whole numbers of at least 1 that commas separate; raises as `positive` does."""
    return [positive(word) for word in text.split(",")]


def positive_floats(text: str) -> list[float]:
    """Return finite numbers above 0 that commas separate; raises as `positive` does."""
    return [positive_float(word) for word in text.split(",")]


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return number


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
