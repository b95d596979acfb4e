"""Sessions that move alone in the simulated cluster."""

from __future__ import annotations

from dataclasses import replace

from services.controller.simulation import baselines
from services.controller.simulation.hardware import PAPER_NODE, opt_models
from services.controller.simulation.workload import Request
from services.controller.simulation.world import World

CROWD = 6


def test_some_sessions_of_a_replica_go_on_at_another_one_and_none_is_lost() -> None:
    (plain,) = opt_models("opt-6.7b", 1)
    model = replace(plain, concurrency=CROWD, max_replicas=2, keep_alive_seconds=1e6)
    world = World([replace(PAPER_NODE, device_count=1)] * 2, [model], baselines.serverless(1))
    source, target = (world.start(model, node, (0,)) for node in world.nodes.values())
    world.clock.at(60.0, lambda: world.shift(source, target, 2))

    world.run([Request(50.0 + 0.1 * number, model.name, 10, 1500) for number in range(CROWD)])

    assert world.counters.shifts == 2
    assert sorted(session.migrations for session in world.sessions) == [0] * (CROWD - 2) + [1] * 2
    assert not any(session.lost or session.preemptions or session.kept_tokens for session in world.sessions)
