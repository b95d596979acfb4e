"""How often a controller looks for cyclic garbage: rarely, since what it decides leaves hardly any."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 20_000
"""A decision makes a thousand objects that are gone with it: at Python's 700 each waits for a look or two."""
OLD_ROUNDS = (20, 50)
"""Rounds of one generation before the next older one is looked through."""


def collect_rarely() -> None:
    """Set this process's thresholds, for good."""
    gc.set_threshold(YOUNG_OBJECTS, *OLD_ROUNDS)
