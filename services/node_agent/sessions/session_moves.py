"""Sessions that a controller wants elsewhere: their readers are asked to move them."""

from __future__ import annotations

from collections.abc import Mapping

from services.node_agent.sessions.relay import SessionRelay
from stoker.errors import Fenced, ReplicaGone
from stoker.v1.node_agent_pb2 import MoveSessionsRequest, MoveSessionsResponse


def ask_to_move(
    order: MoveSessionsRequest, relays: Mapping[str, tuple[str, SessionRelay]], *, highest_fence: int
) -> MoveSessionsResponse:
    """Tell the sessions' readers to move them; the replica they run on stays.

    Args:
        order: Which sessions, and where to.
        relays: The model and the sessions of each replica served here.
        highest_fence: Of the controllers that have spoken.

    Raises:
        Fenced: A later controller has spoken.
        ReplicaGone: The replica that was named is not served here.
    """
    if order.fence < highest_fence:
        raise Fenced(
            f"an order to move sessions has fence {order.fence}; a controller with {highest_fence} has spoken"
        )
    if order.replica_id and order.replica_id not in relays:
        raise ReplicaGone(
            f"replica {order.replica_id} is not served on this node: its sessions can't be moved"
        )
    for replica_id in [order.replica_id] if order.replica_id else relays:
        model, relay = relays[replica_id]
        if not order.replica_id and not relay.has_request(order.request_id):
            continue
        to = order.to_replica_id or order.to_replica_ids.get(model, "")
        count = 0
        if to and to != replica_id:
            count = relay.ask_to_leave(
                order.reason,
                0.0,
                to_replica_id=to,
                request_id=order.request_id,
                max_sessions=order.max_sessions,
            )
        return MoveSessionsResponse(sessions=count, replica_id=replica_id, model=model)
    return MoveSessionsResponse()
