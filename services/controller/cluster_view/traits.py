"""What one reserved replica adds to the summary of its node, and what losing an idle one is worth. Pure.

A trait holds until its node reports, its reservation or a model changes: of a node's eight replicas, an event
about one costs the trait of one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from services.controller.cluster_view.estimate import (
    NOTHING_HELD,
    learnt_parts,
    load_seconds,
    worker_wait_seconds,
)
from services.controller.cluster_view.fleet import Member, Standing, is_idle, member
from services.controller.cluster_view.streaming import pool_bytes_on
from services.controller.cluster_view.view import Checkpoint, Model, Node, Reservation, View
from stoker.ids import ModelName, ReplicaId

ANYBODY = ModelName("")
"""Whom a replica makes room for that stops for no model in particular."""
WORTH_DECAY_SECONDS = 60.0
"""The chance that an idle replica is asked for again falls by e in this time. An exponential keeps the order
of idle replicas by worth the same as time passes, so that they can be kept sorted (LRFU's trick)."""
WORTH_LOG_LIMIT = 50.0
"""No worth is above e to this: it would be endless."""


class Trait(NamedTuple):
    """A reserved replica, as far as its node's summary needs it; a tuple, because it is only read.

    Attributes:
        reservation: Whose trait it is.
        takes_worker: It is ordered and may take a warm worker first.
        worth_key: `worth_key`, where it is idle and may make room for others.
        busy: It serves sessions now and may make room for others: their tokens, and its checkpoint's bytes.
        settled_at_seconds: When it became ready, where its weights are all there.
        leaving_for: Whom it makes room for, where it is on its way out.
        loading: What it still reads: its checkpoint, and the bytes that are not in the node's memory.
        coming: What it will lease and the store does not show yet, with the bytes of the pool it takes.
    """

    reservation: Reservation
    takes_worker: bool
    worth_key: tuple[float, ReplicaId] | None
    busy: tuple[int, int] | None
    settled_at_seconds: float | None
    leaving_for: ModelName | None
    loading: tuple[Checkpoint, int] | None
    coming: tuple[Checkpoint, int] | None


def trait_of(view: View, node: Node, reservation: Reservation) -> Trait:
    """Return the trait of a reservation on `node`."""
    found = member(view, reservation)
    model, replica, standing = view.models.get(reservation.model), found.replica, found.standing
    is_starting, is_ready = standing is Standing.STARTING, standing is Standing.READY
    worth, busy = None, None
    if is_ready and replica is not None and model is not None and not model.pinned:
        if is_idle(found):
            worth = (worth_key(model, node, found), reservation.replica_id)
        if replica.sessions > 0 and reservation.moving_to is None:
            busy = (replica.context_tokens, model.file_bytes)
    is_settled = is_ready and replica is not None and not replica.loading
    return Trait(
        reservation=reservation,
        takes_worker=is_starting and replica is None,
        worth_key=worth,
        busy=busy,
        settled_at_seconds=(replica.ready_since_seconds or 0.0) if is_settled and replica else None,
        leaving_for=_leaving_for(found),
        loading=_loading(node, model) if replica is None or replica.ready_since_seconds is None else None,
        coming=_coming(node, model) if is_starting else None,
    )


def worth_key(model: Model, node: Node, found: Member) -> float:
    """Return the logarithm of `worth_seconds` at time 0: what orders idle replicas at any time."""
    worker_seconds = worker_wait_seconds(node, 0)
    load = load_seconds(model, node, loading_bytes=0, has_peer=True)
    restart = learnt_parts(model, ()).start_seconds(worker_seconds, load)
    idle_since_seconds = found.replica.idle_since_seconds if found.replica else None
    return math.log(max(restart, 0.001)) + (idle_since_seconds or 0.0) / WORTH_DECAY_SECONDS


def worth_seconds(key: float, now_seconds: float) -> float:
    """Return what losing an idle replica is expected to cost: its restart, if it is wanted soon.

    The chance is 1 for a replica that has just fallen idle and falls by e in `WORTH_DECAY_SECONDS`.
    """
    return math.exp(min(key - now_seconds / WORTH_DECAY_SECONDS, WORTH_LOG_LIMIT))


def _leaving_for(found: Member) -> ModelName | None:
    if found.standing is Standing.STOPPING or found.reservation.moving_to is not None:
        return found.reservation.stopping_for or ANYBODY
    return None


def _loading(node: Node, model: Model | None) -> tuple[Checkpoint, int] | None:
    if model is None:
        return None
    held = node.held.get(model.checkpoint, NOTHING_HELD)
    missing_bytes = model.file_bytes - held.dram_bytes
    return (model.checkpoint, missing_bytes) if missing_bytes > 0 else None


def _coming(node: Node, model: Model | None) -> tuple[Checkpoint, int] | None:
    if model is None or node.held.get(model.checkpoint, NOTHING_HELD).leases:
        return None
    return model.checkpoint, pool_bytes_on(model, node)
