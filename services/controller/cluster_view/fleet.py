"""Reservations and reports joined: which replicas a model has, and which slots are taken. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from services.controller.cluster_view.view import Node, Phase, Replica, Reservation, Scheduling, View
from stoker.ids import ModelName


class Standing(Enum):
    """What a reserved replica is good for."""

    STARTING = "starting"
    """Ordered or loading; or its node has not reported yet since this controller leads."""
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"
    GONE = "gone"
    """Its node is unreachable, or a gateway found it broken on a node whose stream is broken too."""


class Member(NamedTuple):
    """A reserved replica: its reservation, what its node says of it, and what follows.

    A tuple, because each event makes those of a whole node: a sixth of a frozen dataclass's time.
    """

    reservation: Reservation
    replica: Replica | None
    node: Node | None
    standing: Standing
    stale: bool
    """It runs what was deployed before the model's last change."""


_new_tuple = tuple.__new__
"""Makes a named tuple without the call that names its fields."""


def member(view: View, reservation: Reservation) -> Member:
    """Return the reserved replica as it stands."""
    node = view.nodes.get(reservation.node_id)
    replica = node.replicas.get(reservation.replica_id) if node is not None else None
    model = view.models.get(reservation.model)
    if (
        replica is not None
        and replica.phase is Phase.READY
        and node is not None
        and node.connected
        and node.reachable
        and reservation.stopping_since_seconds is None
        and not reservation.releasing
    ):
        standing = Standing.READY  # as most do: said without asking further
    else:
        standing = _standing(view, reservation, node, replica)
    stale = model is not None and model.runtime != reservation.runtime
    return _new_tuple(Member, (reservation, replica, node, standing, stale))


def members_by_model(view: View) -> Mapping[ModelName, tuple[Member, ...]]:
    """Return every reserved replica under its model, in the order of their ids."""
    found: dict[ModelName, list[Member]] = defaultdict(list)
    for replica_id in sorted(view.reservations):
        reservation = view.reservations[replica_id]
        found[reservation.model].append(member(view, reservation))
    return {name: tuple(members) for name, members in found.items()}


def members_of(view: View, name: ModelName) -> tuple[Member, ...]:
    """Return the reserved replicas of one model, in the order of their ids."""
    if view.index is not None:
        return tuple(
            member(view, view.reservations[replica_id]) for replica_id in view.index.of_model.get(name, ())
        )
    mine = sorted(
        (reservation for reservation in view.reservations.values() if reservation.model == name),
        key=lambda reservation: reservation.replica_id,
    )
    return tuple(member(view, reservation) for reservation in mine)


def is_idle(member: Member) -> bool:
    """Tell whether the replica is ready and no session runs on it."""
    replica = member.replica
    return (
        member.standing is Standing.READY
        and replica is not None
        and replica.sessions == 0
        and replica.idle_since_seconds is not None
    )


def is_leaving(view: View, member: Member) -> bool:
    """Tell whether the replica's node is being emptied: by an operator, or because its agent ends."""
    if view.scheduling.get(member.reservation.node_id) is Scheduling.DRAINED:
        return True
    return member.node is not None and member.node.draining


def _standing(view: View, reservation: Reservation, node: Node | None, replica: Replica | None) -> Standing:
    if reservation.stopping_since_seconds is not None or reservation.releasing:
        return Standing.STOPPING
    if node is None:
        return Standing.GONE if reservation.lost else Standing.STARTING
    if not node.reachable or (reservation.replica_id in view.distrusted and not node.connected):
        return Standing.GONE
    if replica is None:
        return Standing.GONE if reservation.reported else Standing.STARTING
    return _standing_of(replica.phase)


def _standing_of(phase: Phase) -> Standing:
    """Compare one by one: an enum member's hash is computed in Python."""
    if phase is Phase.READY:
        return Standing.READY
    if phase is Phase.STARTING:
        return Standing.STARTING
    return Standing.STOPPING if phase is Phase.STOPPING else Standing.FAILED
