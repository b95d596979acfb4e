"""Supervision: orders, fences, failures and stops, as a pure state machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.node_agent.host_state import (
    DrainOrdered,
    FailSessions,
    FenceSeen,
    LoadModel,
    LoadRefused,
    ReplicaPhase,
    SessionsEnded,
    SpawnWorker,
    StartOrdered,
    Tick,
    WakeAt,
)
from stoker.errors import CapacityError, Fenced, InvalidRequest, ReplicaBusy, ReplicaGone, StokerError
from stoker.ids import ReplicaId, WorkerId
from stoker.v1.node_agent_pb2 import StartReplicaRequest
from tests.unit.services.node_agent.supervision_desk import (
    Desk,
    ended,
    pooled,
    spawned,
    start_ranks,
)

# --- orders to start ---


def test_an_order_goes_to_the_warm_worker_at_once() -> None:
    desk = pooled()
    effects = desk.start()

    assert [effect.worker_id for effect in effects if isinstance(effect, LoadModel)] == ["w-1"]
    assert desk.phase() is ReplicaPhase.STARTING


def test_a_replica_is_ready_when_its_worker_says_so() -> None:
    desk = pooled()
    desk.start()
    desk.loaded("w-1")

    assert desk.phase() is ReplicaPhase.READY


def test_the_same_order_twice_starts_one_replica() -> None:
    desk = pooled()
    desk.start()

    assert not any(isinstance(effect, LoadModel | SpawnWorker) for effect in desk.start())
    assert len(desk.state.replicas) == 1


def test_an_order_waits_for_a_worker_when_none_is_warm() -> None:
    desk = Desk()
    desk.take(Tick())
    desk.start()
    effects = desk.warm("w-1")

    assert any(isinstance(effect, LoadModel) for effect in effects)


def test_an_order_for_a_slot_that_is_being_freed_waits_until_its_worker_has_ended() -> None:
    desk = pooled()
    worker = desk.ready("rep-1", 0)
    desk.warm("w-2")
    desk.stop("rep-1")

    assert not any(isinstance(effect, LoadModel) for effect in desk.start("rep-2", 0))
    assert any(isinstance(effect, LoadModel) for effect in desk.exit(worker))


def test_an_order_for_a_slot_in_use_is_refused() -> None:
    desk = pooled()
    desk.ready("rep-1", 0)

    with pytest.raises(CapacityError, match="device 0 is held by replica rep-1"):
        desk.start("rep-2", 0)


@pytest.mark.parametrize("devices", [(7,), (0, 7)])
def test_an_order_for_a_slot_the_host_does_not_have_is_refused(devices: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match="device 7"):
        pooled().start("rep-1", *devices)


def test_an_order_without_a_slot_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="names no device"):
        pooled().take(StartOrdered(order=StartReplicaRequest(replica_id="rep-1", fence=1)))


def test_a_late_duplicate_of_a_stopped_replicas_order_is_refused() -> None:
    desk = pooled()
    worker = desk.ready()
    desk.stop()
    desk.exit(worker)

    with pytest.raises(ReplicaGone, match="was stopped here"):
        desk.start()


def test_ids_of_stopped_replicas_are_forgotten_beyond_a_bound() -> None:
    desk = pooled(remembered_replicas=2)
    for number in range(5):
        desk.stop(f"rep-{number}")

    assert desk.state.retired == ("rep-3", "rep-4")


def test_waiting_orders_fail_when_no_worker_starts() -> None:
    desk = Desk(spawn_attempts=2)
    desk.take(Tick())
    desk.start()
    desk.exit("w-1")
    assert desk.phase() is ReplicaPhase.STARTING
    desk.take(Tick(), after=60.0)
    desk.exit("w-2")

    assert desk.phase() is ReplicaPhase.FAILED
    assert "killed by SIGKILL" in desk.state.replicas[ReplicaId("rep-1")].error_message


# --- fences ---


def test_an_order_with_a_lower_fence_than_the_highest_seen_is_refused() -> None:
    desk = pooled()
    desk.start("rep-1", 0, fence=5)

    with pytest.raises(Fenced):
        desk.start("rep-2", 1, fence=4)
    with pytest.raises(Fenced):
        desk.stop("rep-1", fence=4)


def test_an_answer_to_a_report_raises_the_fence_too() -> None:
    desk = pooled()
    desk.take(FenceSeen(fence=9))
    desk.take(FenceSeen(fence=3))

    with pytest.raises(Fenced):
        desk.start(fence=8)


def test_a_refused_order_changes_nothing() -> None:
    desk = pooled()
    desk.take(FenceSeen(fence=9))
    before = desk.state

    with pytest.raises(Fenced):
        desk.start(fence=8)
    assert desk.state == before


# --- failures ---


def test_a_worker_killed_while_loading_fails_its_replica_and_is_replaced() -> None:
    desk = pooled()
    desk.start()
    effects = desk.exit("w-1")
    hosted = desk.state.replicas[ReplicaId("rep-1")]

    assert (hosted.phase, hosted.error_code) == (ReplicaPhase.FAILED, "worker_died")
    assert spawned(effects) == ["w-2"]


def test_a_worker_killed_while_serving_fails_its_replica_and_its_sessions() -> None:
    desk = pooled()
    worker = desk.ready()
    effects = desk.exit(worker)

    assert desk.phase() is ReplicaPhase.FAILED
    assert [e.error_code for e in effects if isinstance(e, FailSessions)] == ["worker_died"]


def test_a_refused_load_fails_the_replica_with_its_reason_and_ends_the_worker() -> None:
    desk = pooled()
    desk.start()
    refused = LoadRefused(worker_id=WorkerId("w-1"), error_code="does_not_fit", error_message="too large")

    assert ended(desk.take(refused)) == ["w-1"]
    assert desk.state.replicas[ReplicaId("rep-1")].error_code == "does_not_fit"
    assert spawned(desk.effects) == ["w-2"]


def test_a_failed_replica_stays_until_it_is_stopped() -> None:
    desk = pooled()
    desk.start()
    desk.exit("w-1")
    desk.take(Tick(), after=1000.0)
    assert desk.phase() is ReplicaPhase.FAILED

    desk.stop()
    assert desk.phase() is None


def test_the_slot_of_a_failed_replica_is_free_once_its_worker_has_ended() -> None:
    desk = pooled()
    desk.start("rep-1", 0)
    desk.exit("w-1")
    desk.start("rep-2", 0)

    assert desk.phase("rep-2") is ReplicaPhase.STARTING


# --- orders to stop ---


def test_an_idle_replica_is_ended_at_once() -> None:
    desk = pooled()
    worker = desk.ready()

    assert ended(desk.stop(only_if_idle=True)) == [worker]
    assert desk.phase() is ReplicaPhase.STOPPING
    desk.exit(worker)
    assert desk.phase() is None


def test_a_busy_replica_is_not_stopped_when_only_an_idle_one_may_be() -> None:
    desk = pooled()
    desk.ready()

    with pytest.raises(ReplicaBusy, match="2 sessions"):
        desk.stop(only_if_idle=True, session_count=2)
    assert desk.phase() is ReplicaPhase.READY


def test_a_busy_replica_ends_with_its_last_session() -> None:
    desk = pooled()
    worker = desk.ready()

    assert ended(desk.stop(session_count=1, grace_seconds=10.0)) == []
    assert ended(desk.take(SessionsEnded(replica_id=ReplicaId("rep-1")))) == [worker]


def test_a_busy_replica_ends_with_its_grace() -> None:
    desk = pooled()
    worker = desk.ready()
    effects = desk.stop(session_count=1, grace_seconds=10.0)

    assert WakeAt(at_seconds=110.0) in effects
    assert ended(desk.take(Tick(), after=10.0)) == [worker]
    effects = desk.exit(worker)
    assert [e.error_code for e in effects if isinstance(e, FailSessions)] == ["replica_gone"]


def test_a_second_stop_shortens_the_grace_but_never_extends_it() -> None:
    desk = pooled()
    desk.ready()
    desk.stop(session_count=1, grace_seconds=10.0)
    desk.stop(session_count=1, grace_seconds=5.0)
    desk.stop(session_count=1, grace_seconds=50.0)

    assert desk.state.replicas[ReplicaId("rep-1")].stop_at_seconds == 105.0


def test_a_loading_replica_can_be_stopped() -> None:
    desk = pooled()
    desk.start()

    assert ended(desk.stop()) == ["w-1"]
    desk.loaded("w-1")
    assert desk.phase() is ReplicaPhase.STOPPING


def test_a_waiting_order_can_be_taken_back() -> None:
    desk = Desk(prestarted_workers=0)
    desk.start()
    desk.stop()

    assert desk.phase() is None


def test_stopping_what_is_not_there_is_no_error() -> None:
    assert ended(pooled().stop("rep-unknown")) == []


# --- the end ---


def test_a_draining_host_ends_its_pool_refuses_orders_and_keeps_its_replicas() -> None:
    desk = pooled()
    desk.ready()
    desk.warm("w-2")

    assert ended(desk.take(DrainOrdered())) == ["w-2"]
    assert desk.phase() is ReplicaPhase.READY
    with pytest.raises(CapacityError, match="about to stop"):
        desk.start("rep-2", 1)
    assert spawned(desk.exit("w-2")) == []


EVENTS = st.one_of(
    st.tuples(st.just("start"), st.integers(1, 4), st.integers(0, 2)),
    st.tuples(st.just("ranks"), st.integers(1, 4), st.just(0)),
    st.tuples(st.just("stop"), st.integers(1, 4), st.integers(0, 2)),
    st.tuples(st.just("warm"), st.integers(1, 8), st.just(0)),
    st.tuples(st.just("exit"), st.integers(1, 8), st.just(0)),
    st.tuples(st.just("loaded"), st.integers(1, 8), st.just(0)),
    st.tuples(st.just("ended"), st.integers(1, 4), st.just(0)),
    st.tuples(st.just("tick"), st.just(0), st.integers(0, 200)),
)


@given(st.lists(EVENTS, max_size=60))
def test_no_order_of_events_breaks_an_invariant(  # noqa: C901 - one case per event
    events: list[tuple[str, int, int]],
) -> None:
    desk = Desk()
    for kind, number, other in events:
        try:
            match kind:
                case "start":
                    desk.start(f"rep-{number}", other)
                case "ranks":
                    start_ranks(desk, f"rep-{number}")
                case "stop":
                    desk.stop(f"rep-{number}", session_count=other, grace_seconds=5.0)
                case "warm":
                    desk.warm(f"w-{number}")
                case "exit":
                    desk.exit(f"w-{number}")
                case "loaded":
                    desk.loaded(f"w-{number}")
                case "ended":
                    desk.take(SessionsEnded(replica_id=ReplicaId(f"rep-{number}")))
                case "tick":
                    desk.take(Tick(), after=float(other))
        except StokerError:
            continue
