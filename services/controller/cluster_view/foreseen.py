"""Folds that planning has made, taken over when what was planned happens. Pure.

A plan folds each of its decisions at once, into a view of its own; then the shell folds the events that carry
it out into the cluster's view: mostly the very same view and an equal event, so the view after it is known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from services.controller.cluster_view.events import Event
from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.view import View


class Foreseen(NamedTuple):
    """A fold: `after` is `fold(before, event)`."""

    before: View
    event: Event
    after: View


def fold_foreseen(view: View, event: Event, foreseen: Iterable[Foreseen]) -> View:
    """Return `fold(view, event)`, from one of these folds where it is among them."""
    for before, planned, after in foreseen:
        if before is view and planned == event:
            return after
    return fold(view, event)
