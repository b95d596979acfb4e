"""Rebalancing carried out: whom agents are told to move, what operators read, what a refusal means."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from services.controller.cluster_view.forecast import arrived
from services.controller.cluster_view.learnt import Arrivals
from services.controller.cluster_view.view import Policy, View
from services.controller.rebalancer import Rebalancer
from services.controller.scaling.actions import Migrate, Start
from services.controller.scaling.rebalancing import RebalanceLimits
from stoker.background import background
from stoker.clock import ManualClock
from stoker.errors import ReplicaGone
from stoker.ids import ModelName, ReplicaId
from tests.unit.services.controller.builders import a_model, a_node, a_replica, a_reservation, a_view

LIMITS = RebalanceLimits(crowded_seconds=0.0, hysteresis_ratio=1.0)


class FakeCluster:
    """A view, what was told and what was ordered."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.policy = Policy(may_migrate=True)
        self.told: list[tuple[str, dict[str, object]]] = []
        self.ordered: list[Migrate | Start] = []

    def tell(self, kind: str, **fields: object) -> None:
        """Keep the event."""
        self.told.append((kind, fields))

    def order(self, action: Migrate | Start) -> None:
        """Keep the order."""
        self.ordered.append(action)


class FakeAgents:
    """Agents that answer at once."""

    def __init__(self, *, gone: bool = False) -> None:
        self.orders: list[tuple[str, str, str, int]] = []
        self._gone = gone

    async def shift_sessions(
        self, address: str, replica_id: ReplicaId, *, to_replica_id: ReplicaId, max_sessions: int, reason: str
    ) -> int:
        """Ask all of them, or say that the replica is gone."""
        self.orders.append((address, replica_id, to_replica_id, max_sessions))
        if self._gone:
            raise ReplicaGone(reason)
        return max_sessions


def crowded() -> View:
    """One replica with six sessions for four, one with none."""
    busy = a_replica("r0", sessions=6, idle_since_seconds=None)
    return a_view(
        models=(a_model(concurrency=4, max_replicas=2),),
        nodes=(a_node("a", replicas=(busy,)), a_node("b", replicas=(a_replica("r1"),))),
        reservations=(a_reservation("r0"), a_reservation("r1", node_id="b")),
    )


async def looks(cluster: FakeCluster, agents: FakeAgents, clock: ManualClock, seconds: int = 3) -> None:
    """Look each second for so long, with everything that was begun done in between."""
    rebalancer = Rebalancer(cluster, agents, LIMITS, look_seconds=1.0, begin_seconds=0.0, clock=clock)
    async with background() as tasks:
        for _ in range(seconds):
            rebalancer.look(tasks)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            clock.advance(1.0)


async def test_the_agent_of_a_crowded_replica_is_told_once_how_many_go_where() -> None:
    cluster, agents = FakeCluster(crowded()), FakeAgents()

    await looks(cluster, agents, ManualClock())

    assert agents.orders == [("a:7071", "r0", "r1", 2)]
    ((kind, fields),) = cluster.told
    assert (kind, fields["sessions"], fields["reason"]) == ("sessions.shifted", 2, "crowded")


async def test_an_agent_that_cannot_is_not_asked_again_at_once_and_operators_read_why() -> None:
    cluster, agents = FakeCluster(crowded()), FakeAgents(gone=True)

    await looks(cluster, agents, ManualClock(), seconds=int(LIMITS.rest_seconds))

    assert len(agents.orders) == 1
    ((kind, fields),) = cluster.told
    assert (kind, fields["error_code"]) == ("sessions.not_shifted", "replica_gone")


async def test_a_node_is_cleared_by_moving_what_is_in_the_way_of_a_likely_model() -> None:
    clock = ManualClock()
    view = a_view(
        models=(a_model("s"), a_model("t"), a_model("large", devices=2, keep_alive_seconds=0.0)),
        nodes=tuple(
            a_node(
                name,
                devices=2,
                replicas=(a_replica(f"{name}0", model, sessions=1, idle_since_seconds=None),),
            )
            for name, model in (("a", "s"), ("b", "t"))
        ),
        reservations=(a_reservation("a0", "s"), a_reservation("b0", "t", "b")),
    )
    long_ready = {
        node_id: replace(
            node,
            last_seen_seconds=clock.now_seconds(),
            replicas={
                key: replace(each, ready_since_seconds=clock.now_seconds() - 600.0)
                for key, each in node.replicas.items()
            },
        )
        for node_id, node in view.nodes.items()
    }
    cluster = FakeCluster(replace(view, nodes=long_ready, arrivals={ModelName("large"): often(clock)}))

    await looks(cluster, FakeAgents(), clock)

    (move,) = cluster.ordered
    assert isinstance(move, Migrate)
    assert (move.replica_id, move.to_node_id, move.for_model) == ("a0", "b", None)
    assert [kind for kind, _ in cluster.told] == ["node.cleared"]


def often(clock: ManualClock) -> Arrivals:
    """A model that is asked for every minute."""
    found = None
    for number in range(12, 0, -1):
        found = arrived(found, clock.now_seconds() - 60.0 * number)
    assert found is not None
    return found
