"""Supervision: replicas that take sessions while their weights arrive."""

from __future__ import annotations

from services.node_agent.host_state import (
    EndWorker,
    FailSessions,
    ReplicaPhase,
    SpawnWorker,
    Tick,
    WakeAt,
)
from stoker.ids import ReplicaId, WorkerId
from tests.unit.services.node_agent.supervision_desk import (
    Desk,
)


def test_a_replica_takes_sessions_before_its_weights_are_there() -> None:
    desk = Desk()
    desk.loading()

    hosted = desk.state.replicas[ReplicaId("rep-1")]
    assert (hosted.phase, hosted.is_loading) == (ReplicaPhase.READY, True)


def test_the_timings_follow_when_the_weights_are_there() -> None:
    desk = Desk()
    desk.loading()
    desk.arrived("w-1", after=2.0)

    hosted = desk.state.replicas[ReplicaId("rep-1")]
    assert (hosted.is_loading, hosted.loaded.timings.weights_seconds, hosted.loaded.max_batch) == (
        False,
        2.0,
        8,
    )
    assert hosted.complete_seconds == hosted.ready_seconds + 2.0


def test_the_pool_is_refilled_a_pause_after_the_last_weights() -> None:
    desk = Desk(refill_pause_seconds=1.0)
    desk.loading()
    assert not [effect for effect in desk.effects if isinstance(effect, SpawnWorker)]

    wake = desk.arrived("w-1")[-1]
    assert wake == WakeAt(at_seconds=desk.now + 1.0)

    assert SpawnWorker(worker_id=WorkerId("w-2")) in desk.take(Tick(), after=1.0)


def test_an_order_gets_its_worker_during_the_pause() -> None:
    desk = Desk(refill_pause_seconds=1.0)
    desk.loading()

    assert SpawnWorker(worker_id=WorkerId("w-2"), is_awaited=True) in desk.start("rep-2", 1)


def test_weights_that_will_not_come_fail_the_replica_its_sessions_and_its_worker() -> None:
    desk = Desk()
    desk.loading()
    effects = desk.lost("w-1")

    hosted = desk.state.replicas[ReplicaId("rep-1")]
    assert (hosted.phase, hosted.error_code, hosted.error_message) == (
        ReplicaPhase.FAILED,
        "load_failed",
        "disk broke",
    )
    failed = next(effect for effect in effects if isinstance(effect, FailSessions))
    assert failed.error_code == "worker_died"
    assert "disk broke" in failed.error_message
    assert EndWorker(worker_id=WorkerId("w-1")) in effects


def test_weights_that_are_lost_after_they_came_are_no_news() -> None:
    desk = Desk()
    desk.loading()
    desk.arrived("w-1")

    assert not [effect for effect in desk.lost("w-1") if isinstance(effect, EndWorker | FailSessions)]
    assert desk.state.replicas[ReplicaId("rep-1")].phase is ReplicaPhase.READY


def test_a_replica_that_loads_can_be_stopped_at_once() -> None:
    desk = Desk()
    desk.loading()

    assert EndWorker(worker_id=WorkerId("w-1")) in desk.stop("rep-1")
    desk.exit("w-1")
    assert ReplicaId("rep-1") not in desk.state.replicas


def test_a_replica_that_is_being_stopped_is_not_failed_by_its_load() -> None:
    desk = Desk()
    desk.loading()
    desk.stop("rep-1", grace_seconds=5.0, session_count=1)

    assert EndWorker(worker_id=WorkerId("w-1")) in desk.lost("w-1")
    assert desk.state.replicas[ReplicaId("rep-1")].phase is ReplicaPhase.STOPPING
