"""May a replica have the slots that its order names? Pure."""

from __future__ import annotations

from collections.abc import Collection

from services.node_agent.host_state import Hosted, Policy, ReplicaPhase
from services.node_agent.workers.replica_workers import shares_of
from stoker.errors import CapacityError, InvalidRequest


def check_slots(policy: Policy, hosted: Hosted, others: Collection[Hosted]) -> None:
    """Refuse slots that are not here, not as many as its ranks need, or held by another replica.

    Raises:
        InvalidRequest: The order makes no sense on this host.
        CapacityError: A slot is taken.
    """
    replica_id = hosted.replica_id
    if not hosted.devices:
        raise InvalidRequest(f"replica {replica_id} names no device", param="devices")
    shares_of(hosted.order)
    for index in hosted.devices:
        if index not in policy.devices:
            raise InvalidRequest(
                f"replica {replica_id} wants device {index}; this node has {list(policy.devices)}",
                param="devices",
            )
        for other in others:
            if index in other.devices and other.phase in (ReplicaPhase.STARTING, ReplicaPhase.READY):
                raise CapacityError(
                    f"device {index} is held by replica {other.replica_id} ({other.phase}): stop it first"
                )
