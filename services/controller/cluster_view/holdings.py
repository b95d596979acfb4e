"""What has changed of what a store holds, found without looking each checkpoint up. Pure.

A store holds thousands of checkpoints, and a report changes few of them. Reports that are made from the one
before name the same checkpoints in the same order, and most values are the very same objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from operator import is_, is_not

from services.controller.cluster_view.view import Checkpoint, Held

Change = tuple[Checkpoint, Held | None, Held | None]
"""A checkpoint, and what was and is held of it; None = nothing."""


def held_changes(was: Mapping[Checkpoint, Held], now: Mapping[Checkpoint, Held]) -> list[Change]:
    """Return what is other than before, in no order that means anything."""
    if was is now:
        return []
    if len(was) == len(now) and all(map(is_, was, now)):
        others = compress(was, map(is_not, was.values(), now.values()))
        return [(each, was[each], now[each]) for each in others if was[each] != now[each]]
    gone = [(checkpoint, was[checkpoint], None) for checkpoint in was if checkpoint not in now]
    changed = [
        (checkpoint, before, after)
        for checkpoint, after in now.items()
        if (before := was.get(checkpoint)) is not after and before != after
    ]
    return [*gone, *changed]
