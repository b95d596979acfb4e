"""What agents say becomes the view's values; what an older one leaves out stays unknown."""

from __future__ import annotations

import pytest

from services.controller.wire import node_of
from stoker.v1 import node_agent_pb2


@pytest.mark.parametrize(
    ("longest_wait_seconds", "since_seconds"),
    [(30.0, 70.0), (0.0, 100.0), (-1.0, 100.0), (None, None)],
    ids=["it waits", "it has just come", "a wait that cannot be", "an older agent"],
)
def test_the_longest_wait_is_told_as_a_duration(
    longest_wait_seconds: float | None, since_seconds: float | None
) -> None:
    replica = node_agent_pb2.Replica(
        replica_id="m.1",
        model="m",
        state=node_agent_pb2.REPLICA_STATE_READY,
        running_sessions=2,
        waiting_sessions=1,
        longest_wait_seconds=longest_wait_seconds,
    )

    (found,) = node_of(node_agent_pb2.NodeReport(node_id="n", replicas=[replica]), 100.0).replicas.values()

    assert found.longest_since_seconds == since_seconds
