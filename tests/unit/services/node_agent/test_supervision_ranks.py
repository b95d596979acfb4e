"""Supervision: replicas of several ranks."""

from __future__ import annotations

import pytest

from services.node_agent.host_state import (
    EndWorker,
    FailSessions,
    LoadModel,
    LoadRefused,
    LoadSucceeded,
    ReplicaPhase,
    SpawnWorker,
    Tick,
)
from stoker.errors import InvalidRequest
from stoker.ids import ReplicaId, WorkerId
from stoker.v1.worker_pb2 import LoadModelResponse
from tests.unit.services.node_agent.supervision_desk import (
    Desk,
    ranks_ready,
    start_ranks,
)


def test_a_replica_of_two_ranks_waits_for_two_workers_and_gives_each_one_device():
    desk = Desk(prestarted_workers=1)
    desk.take(Tick())
    desk.warm("w-1")

    start_ranks(desk)
    assert desk.phase() is ReplicaPhase.STARTING
    assert [effect for effect in desk.effects if isinstance(effect, LoadModel)] == []
    spawns = [effect.is_awaited for effect in desk.effects if isinstance(effect, SpawnWorker)]
    assert spawns == [True, False]  # the second rank's, and one for the pool

    loads = [effect for effect in desk.warm(desk.spawning()[0]) if isinstance(effect, LoadModel)]
    assert [(load.rank, load.ranks, load.devices, load.first_worker_id) for load in loads] == [
        (0, 2, (0,), "w-1"),
        (1, 2, (1,), "w-1"),
    ]


def ranks_that_load(desk: Desk) -> None:
    """Bring two ranks up to where the first one takes sessions, while both still wait for weights."""
    start_ranks(desk)
    for worker in desk.spawning():
        desk.warm(worker)
    desk.take(LoadSucceeded(worker_id=WorkerId("w-1"), response=LoadModelResponse(max_batch=8, loading=True)))


def test_a_replica_of_two_ranks_takes_sessions_when_the_first_one_does():
    desk = Desk(prestarted_workers=0)
    ranks_that_load(desk)

    hosted = desk.state.replicas[ReplicaId("rep-1")]
    assert (hosted.phase, hosted.is_loading, hosted.loaded.max_batch) == (ReplicaPhase.READY, True, 8)


def test_a_rank_that_has_loaded_first_takes_no_sessions():
    desk = Desk(prestarted_workers=0)
    start_ranks(desk)
    for worker in desk.spawning():
        desk.warm(worker)

    desk.loaded("w-2")
    assert desk.phase() is ReplicaPhase.STARTING
    desk.loaded("w-1")
    assert not desk.state.replicas[ReplicaId("rep-1")].is_loading


@pytest.mark.parametrize("last", ["w-1", "w-2"])
def test_a_replica_of_two_ranks_is_complete_when_the_weights_of_both_are_there(last):
    desk = Desk(prestarted_workers=0)
    ranks_that_load(desk)

    for worker in sorted(("w-1", "w-2"), key=lambda worker: worker == last):
        assert desk.state.replicas[ReplicaId("rep-1")].is_loading
        desk.arrived("w-1", after=2.0) if worker == "w-1" else desk.loaded("w-2")
    hosted = desk.state.replicas[ReplicaId("rep-1")]
    assert (hosted.is_loading, hosted.loaded.timings.weights_seconds) == (False, 2.0)
    assert hosted.complete_seconds == desk.now


def test_a_rank_whose_weights_do_not_come_ends_sessions_that_wait_for_them_with_the_reason():
    desk = Desk(prestarted_workers=0)
    ranks_that_load(desk)

    refused = LoadRefused(worker_id=WorkerId("w-2"), error_code="load_failed", error_message="disk broke")
    effects = desk.take(refused)

    assert {e.worker_id for e in effects if isinstance(e, EndWorker)} == {"w-1", "w-2"}
    [failed] = [e for e in effects if isinstance(e, FailSessions)]
    assert (failed.worker_id, failed.error_code) == ("w-1", "worker_died")
    hosted = desk.state.replicas[ReplicaId("rep-1")]
    assert (hosted.phase, hosted.error_code, hosted.error_message) == (
        ReplicaPhase.FAILED,
        "load_failed",
        "disk broke",
    )


@pytest.mark.parametrize("dead", [0, 1])
def test_the_end_of_one_rank_is_the_end_of_all_and_is_told_once(dead):
    desk = Desk(prestarted_workers=0)
    workers = ranks_ready(desk)

    effects = desk.exit(workers[dead])

    assert desk.phase() is ReplicaPhase.FAILED
    assert [e.worker_id for e in effects if isinstance(e, EndWorker)] == [workers[1 - dead]]
    assert len([e for e in effects if isinstance(e, FailSessions)]) == 1
    after = desk.exit(workers[1 - dead])
    assert not [e for e in after if isinstance(e, FailSessions | EndWorker)]
    assert desk.phase() is ReplicaPhase.FAILED


def test_a_rank_that_cannot_load_ends_the_others_while_they_wait_for_it():
    desk = Desk(prestarted_workers=0)
    start_ranks(desk)
    for worker in desk.spawning():
        desk.warm(worker)

    refused = LoadRefused(worker_id=WorkerId("w-2"), error_code="load_failed", error_message="disk broke")
    effects = desk.take(refused)

    assert {e.worker_id for e in effects if isinstance(e, EndWorker)} == {"w-1", "w-2"}
    assert desk.phase() is ReplicaPhase.FAILED
    assert desk.state.replicas[ReplicaId("rep-1")].error_message == "disk broke"


def test_a_stopped_replica_of_two_ranks_is_gone_when_both_have_ended_and_a_slot_is_free_by_itself():
    desk = Desk(prestarted_workers=0)
    first, second = ranks_ready(desk)

    effects = desk.stop("rep-1")
    assert {e.worker_id for e in effects if isinstance(e, EndWorker)} == {first, second}
    desk.exit(first)
    assert desk.phase() is ReplicaPhase.STOPPING
    desk.start("rep-2", 0)
    assert [e.devices for e in desk.warm(desk.spawning()[0]) if isinstance(e, LoadModel)] == [(0,)]
    desk.exit(second)
    assert desk.phase() is None


def test_a_replica_of_ranks_without_a_device_for_each_is_refused():
    with pytest.raises(InvalidRequest, match="2 tensor-parallel ranks and 1 devices"):
        start_ranks(Desk(), devices=(0,))
