"""What one reserved replica adds to the summary of its node, and what losing an idle one is worth. Pure.

A trait holds until its node reports, its reservation or a model changes: of a node's eight replicas, an event
about one costs the trait of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import NamedTuple

from services.controller.cluster_view.estimate import (
    NOTHING_HELD,
    device_bytes,
    learnt_parts,
    load_seconds,
    worker_wait_seconds,
)
from services.controller.cluster_view.fleet import Member, Standing, is_idle, member
from services.controller.cluster_view.streaming import pool_bytes_on, streams_on
from services.controller.cluster_view.view import Checkpoint, Model, Node, Replica, Reservation, View
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
        takes_workers: How many warm workers it may take first: it is ordered and has none yet.
        worth_key: What it is worth (`restart_log_on`), where it is idle and may make room for others.
        busy: It serves sessions now and may make room for others: the bytes that a start of it copies to each
            device. How long its contexts are its node says: they grow all the time.
        has_served: It is idle, and has served since it became ready.
        settled_at_seconds: When it became ready, where its weights are all there.
        leaving_for: Whom it makes room for, where it is on its way out.
        loading: What it still reads: its checkpoint, and the bytes that are not in the node's memory.
        coming: What it will lease and the store does not show yet, with the bytes of the pool it takes.
        restart_log: Logarithm of the seconds that a start of it would take there, once that was needed.
    """

    reservation: Reservation
    takes_workers: int
    worth_key: tuple[float, ReplicaId] | None
    busy: int | None
    has_served: bool
    settled_at_seconds: float | None
    leaving_for: ModelName | None
    loading: tuple[Checkpoint, int] | None
    coming: tuple[Checkpoint, int] | None
    restart_log: float | None


_WORTH_KEY, _SETTLED_AT = Trait._fields.index("worth_key"), Trait._fields.index("settled_at_seconds")
_new_tuple = tuple.__new__
"""Makes a named tuple without the call that names its fields."""


def trait_of(view: View, node: Node, reservation: Reservation) -> Trait:
    """Return the trait of a reservation on `node`."""
    found = member(view, reservation)
    model, replica, standing = view.models.get(reservation.model), found.replica, found.standing
    is_starting = standing is Standing.STARTING
    worth_key, busy, restart_log = _load_of(node, model, found, None)
    is_settled = standing is Standing.READY and replica is not None and not replica.loading
    return Trait(
        reservation=reservation,
        takes_workers=len(reservation.devices) if is_starting and replica is None else 0,
        worth_key=worth_key,
        busy=busy,
        has_served=_has_served(replica),
        settled_at_seconds=(replica.ready_since_seconds or 0.0) if is_settled and replica else None,
        leaving_for=_leaving_for(found),
        loading=_loading(node, model) if replica is None or replica.ready_since_seconds is None else None,
        coming=_coming(node, model) if is_starting else None,
        restart_log=restart_log,
    )


def trait_holds(was: Node, now: Node, models: Mapping[ModelName, Model]) -> Callable[[Trait], bool]:
    """Return what tells of a trait on `was` whether it is the same on `now`, its model among these."""
    same = _read_by_all(was) == _read_by_all(now) and (
        was.pool.total_bytes == now.pool.total_bytes and was.pool.window_bytes == now.pool.window_bytes
    )
    same_device = same and was.stages.get("device") == now.stages.get("device")
    same_stages = same_device and was.stages == now.stages

    same_bytes = same_stages and was.held is now.held
    was_replicas, now_replicas = was.replicas, now.replicas

    def holds(trait: Trait) -> bool:
        replica_id = trait.reservation.replica_id
        if not same or not _stands_as_before(was_replicas.get(replica_id), now_replicas.get(replica_id)):
            return False
        if same_bytes:
            return True
        model = models.get(trait.reservation.model)
        if model is None:
            return True
        held = now.held.get(model.checkpoint, NOTHING_HELD)
        if was.held is not now.held and was.held.get(model.checkpoint, NOTHING_HELD) != held:
            return False
        if same_stages or trait.restart_log is None:
            return True
        return same_device and held.dram_bytes >= model.file_bytes and not streams_on(model, now)

    return holds


def _stands_as_before(was: Replica | None, now: Replica | None) -> bool:
    """Tell whether of a replica all is as before that its trait reads."""
    if was is now:
        return True
    return (
        was is not None
        and now is not None
        and (was.sessions > 0) == (now.sessions > 0)
        and _read_of_replica(was) == _read_of_replica(now)
    )


_read_of_replica = attrgetter("phase", "idle_since_seconds", "ready_since_seconds", "loading", "has_served")
"""Of a replica, what its trait may depend on; beside whether it serves sessions."""
_read_by_all = attrgetter(
    "warm_workers",
    "worker_start_seconds",
    "next_worker_seconds",
    "connected",
    "reachable",
    "devices",
    "opening",
    "learnt",
)
"""Of a node, what the traits of all its replicas may depend on; beside its pool and its stages."""


def with_load(view: View, node: Node, trait: Trait) -> Trait:
    """Return a trait after nothing but the sessions of its replica have changed."""
    replica = node.replicas.get(trait.reservation.replica_id)
    if trait.busy is not None and replica is not None and replica.sessions > 0:
        return trait
    found = member(view, trait.reservation)
    model = view.models.get(trait.reservation.model)
    worth_key, busy, restart_log = _load_of(node, model, found, trait.restart_log)
    said = (worth_key, busy, _has_served(found.replica), *trait[_SETTLED_AT:-1], restart_log)
    return _new_tuple(Trait, (*trait[:_WORTH_KEY], *said))


def _has_served(replica: Replica | None) -> bool:
    return replica is not None and replica.has_served and not replica.sessions


def _load_of(
    node: Node, model: Model | None, found: Member, restart_log: float | None
) -> tuple[tuple[float, ReplicaId] | None, int | None, float | None]:
    """Return a trait's `worth_key`, `busy` and `restart_log`, the last as it is where it is known."""
    replica, reservation = found.replica, found.reservation
    if found.standing is not Standing.READY or replica is None or model is None or model.pinned:
        return None, None, restart_log
    worth_key, busy = None, None
    if is_idle(found):
        if restart_log is None:
            restart_log = restart_log_on(model, node)
        worth_key = (restart_log + _faded(replica.idle_since_seconds), reservation.replica_id)
    if replica.sessions > 0 and reservation.moving_to is None:
        busy = int(device_bytes(model))
    return worth_key, busy, restart_log


def restart_log_on(model: Model, node: Node) -> float:
    """Return the logarithm of the seconds that a start would take on a node that holds what it holds.

    With `idle_since_seconds` over the decay it is `worth_key`: the logarithm of `worth_seconds` at time 0, by
    which idle replicas are ordered at any time.
    """
    worker_seconds = worker_wait_seconds(node, 0, model.devices)
    load = load_seconds(model, node, loading_bytes=0, has_peer=True)
    restart_seconds = learnt_parts(model, ()).start_seconds(worker_seconds, load)
    return math.log(max(restart_seconds, 0.001))


def _faded(idle_since_seconds: float | None) -> float:
    return (idle_since_seconds or 0.0) / WORTH_DECAY_SECONDS


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
