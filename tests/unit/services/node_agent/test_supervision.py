"""Supervision: orders, workers' lives, the pool and its back-off, as a pure state machine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.node_agent.host_state import (
    DrainOrdered,
    Effect,
    EndWorker,
    Event,
    FailSessions,
    FenceSeen,
    HostState,
    LoadModel,
    LoadRefused,
    LoadSucceeded,
    Policy,
    PoolWanted,
    ReplicaPhase,
    SessionsEnded,
    SpawnWorker,
    StartOrdered,
    StopOrdered,
    Tick,
    WakeAt,
    WeightsArrived,
    WeightsLost,
    WorkerExited,
    WorkerPhase,
    WorkerWarm,
)
from services.node_agent.supervision import handle
from services.node_agent.workers.worker_pool import backoff_seconds
from stoker.errors import CapacityError, Fenced, InvalidRequest, ReplicaBusy, ReplicaGone, StokerError
from stoker.ids import ReplicaId, WorkerId
from stoker.v1.node_agent_pb2 import StartReplicaRequest
from stoker.v1.start_pb2 import StartTimings
from stoker.v1.worker_pb2 import LoadModelResponse


class Desk:
    """Feeds events to the state machine and keeps what came of them."""

    def __init__(self, **policy: Any) -> None:
        self.policy = Policy(**({"devices": (0, 1), "worker_prefix": "w"} | policy))
        self.state = HostState()
        self.now = 100.0
        self.effects: tuple[Effect, ...] = ()

    def take(self, event: Event, *, after: float = 0.0) -> tuple[Effect, ...]:
        """Take an event, some seconds after the last one."""
        self.now += after
        self.state, self.effects = handle(self.policy, self.state, event, self.now)
        check_invariants(self.state)
        return self.effects

    def start(self, replica: str = "rep-1", *devices: int, fence: int = 1) -> tuple[Effect, ...]:
        """Order a replica."""
        order = StartReplicaRequest(replica_id=replica, devices=devices or (0,), fence=fence)
        return self.take(StartOrdered(order=order))

    def stop(self, replica: str = "rep-1", **order: Any) -> tuple[Effect, ...]:
        """Order a replica gone."""
        fields = {"only_if_idle": False, "grace_seconds": 0.0, "fence": 1, "session_count": 0} | order
        return self.take(StopOrdered(replica_id=ReplicaId(replica), **fields))

    def warm(self, worker: str) -> tuple[Effect, ...]:
        """A worker is warm."""
        return self.take(WorkerWarm(worker_id=WorkerId(worker)))

    def exit(self, worker: str, **when: Any) -> tuple[Effect, ...]:
        """A worker was killed."""
        return self.take(WorkerExited(worker_id=WorkerId(worker), reason="killed by SIGKILL"), **when)

    def loaded(self, worker: str, *, loading: bool = False) -> tuple[Effect, ...]:
        """A worker has loaded, or takes sessions while it does."""
        response = LoadModelResponse(max_batch=8, loading=loading)
        return self.take(LoadSucceeded(worker_id=WorkerId(worker), response=response))

    def loading(self) -> None:
        """Bring replica rep-1 to where it takes sessions while its weights arrive at worker w-1."""
        self.take(Tick())
        self.warm("w-1")
        self.start("rep-1")
        self.loaded("w-1", loading=True)

    def arrived(self, worker: str, **when: Any) -> tuple[Effect, ...]:
        """All weights are there."""
        timings = StartTimings(weights_seconds=2.0)
        return self.take(WeightsArrived(worker_id=WorkerId(worker), timings=timings), **when)

    def lost(self, worker: str) -> tuple[Effect, ...]:
        """The weights will not come."""
        return self.take(
            WeightsLost(worker_id=WorkerId(worker), error_code="load_failed", error_message="disk broke")
        )

    def ready(self, replica: str = "rep-1", device: int = 0) -> str:
        """Bring a replica up with a warm worker; returns the worker."""
        self.start(replica, device)
        worker = self.state.replicas[ReplicaId(replica)].worker_id
        while worker is None:
            self.warm(self.spawning()[0])
            worker = self.state.replicas[ReplicaId(replica)].worker_id
        self.loaded(worker)
        return worker

    def spawning(self) -> list[str]:
        """Return the workers that are starting."""
        return [w.worker_id for w in self.state.workers.values() if w.phase is WorkerPhase.SPAWNING]

    def phase(self, replica: str = "rep-1") -> ReplicaPhase | None:
        """Return a replica's phase; None when there is none."""
        hosted = self.state.replicas.get(ReplicaId(replica))
        return hosted.phase if hosted is not None else None


def pooled(**policy: Any) -> Desk:
    """Return a desk whose pool has one warm worker, w-1."""
    desk = Desk(**policy)
    desk.take(Tick())
    desk.warm("w-1")
    return desk


def check_invariants(state: HostState) -> None:
    held = [index for worker in state.workers.values() for index in worker.devices]
    assert len(held) == len(set(held)), "a slot is held twice"
    for worker in state.workers.values():
        if worker.phase in (WorkerPhase.LOADING, WorkerPhase.SERVING):
            assert worker.replica_id in state.replicas
    for replica_id, hosted in state.replicas.items():
        assert hosted.replica_id == replica_id
        if hosted.phase is ReplicaPhase.READY:
            assert hosted.worker_id is not None
            assert state.workers[hosted.worker_id].phase is WorkerPhase.SERVING
            assert hosted.loaded is not None
            assert len(phases := phases_of(state, replica_id)) == max(
                1, hosted.order.checkpoint.tensor_parallel
            )
            assert set(phases) <= {WorkerPhase.SERVING, WorkerPhase.LOADING}
            assert hosted.is_loading or set(phases) == {WorkerPhase.SERVING}
        if hosted.phase is ReplicaPhase.FAILED:
            assert hosted.error_code
            assert set(phases_of(state, replica_id)) <= {WorkerPhase.ENDING}, "a rank is left behind"


def phases_of(state: HostState, replica_id: ReplicaId) -> list[WorkerPhase]:
    return [worker.phase for worker in state.workers.values() if worker.replica_id == replica_id]


def spawned(effects: tuple[Effect, ...]) -> list[str]:
    return [effect.worker_id for effect in effects if isinstance(effect, SpawnWorker)]


def ended(effects: tuple[Effect, ...]) -> list[str]:
    return [effect.worker_id for effect in effects if isinstance(effect, EndWorker)]


# --- the pool ---


def test_the_pool_is_filled_at_the_start() -> None:
    assert spawned(Desk(prestarted_workers=2).take(Tick())) == ["w-1", "w-2"]


def test_the_pool_is_never_larger_than_the_host_has_slots() -> None:
    assert spawned(Desk(prestarted_workers=9).take(Tick())) == ["w-1", "w-2"]


def test_forecasts_raise_the_pool_within_the_operators_bound_and_the_slots() -> None:
    desk = Desk(prestarted_workers=1, max_prestarted_workers=2)
    desk.take(Tick())

    assert spawned(desk.take(PoolWanted(count=9))) == ["w-2"]
    assert spawned(Desk(prestarted_workers=0, max_prestarted_workers=2).take(PoolWanted(count=1))) == []


def test_forecasts_lower_the_pool_and_without_one_it_is_as_the_operator_chose() -> None:
    desk = Desk(prestarted_workers=1, max_prestarted_workers=2)
    desk.take(PoolWanted(count=2))
    desk.warm("w-1")
    desk.warm("w-2")

    assert len(ended(desk.take(PoolWanted(count=0)))) == 2
    for worker in ("w-1", "w-2"):
        desk.take(WorkerExited(worker_id=WorkerId(worker), reason="asked to"))
    assert spawned(desk.take(PoolWanted(count=None))) == ["w-3"]


def test_the_pool_is_refilled_only_after_the_load_that_took_its_worker() -> None:
    desk = pooled()

    assert spawned(desk.start()) == []
    assert spawned(desk.loaded("w-1")) == ["w-2"]


def test_a_pool_of_none_starts_a_worker_only_for_an_order() -> None:
    desk = Desk(prestarted_workers=0)

    assert spawned(desk.take(Tick())) == []
    assert spawned(desk.start()) == ["w-1"]


def test_a_worker_whose_order_has_gone_is_ended_when_the_pool_is_full_without_it() -> None:
    desk = pooled()
    desk.start("rep-1", 0)
    assert spawned(desk.start("rep-2", 1)) == ["w-2"]
    assert spawned(desk.loaded("w-1")) == ["w-3"]

    assert ended(desk.stop("rep-2")) == ["w-2"]
    assert desk.spawning() == ["w-3"]


def test_a_worker_for_the_pool_gives_way_and_one_that_an_order_waits_for_does_not() -> None:
    desk = Desk(prestarted_workers=1)
    pool = [effect for effect in desk.take(Tick()) if isinstance(effect, SpawnWorker)]
    desk.warm("w-1")
    desk.start("rep-1", 0)
    awaited = [effect for effect in desk.start("rep-2", 1) if isinstance(effect, SpawnWorker)]

    assert [effect.is_awaited for effect in pool] == [False]
    assert [effect.is_awaited for effect in awaited] == [True]


def test_a_worker_that_does_not_become_warm_in_time_is_ended() -> None:
    desk = Desk(spawn_timeout_seconds=60.0)
    desk.take(Tick())

    assert WakeAt(at_seconds=160.0) in desk.effects
    assert ended(desk.take(Tick(), after=60.0)) == ["w-1"]


def test_workers_that_keep_ending_in_the_pool_are_replaced_ever_more_slowly() -> None:
    desk = Desk(first_backoff_seconds=1.0, longest_backoff_seconds=4.0)
    desk.take(Tick())
    pauses = []
    for number in range(1, 6):
        effects = desk.exit(f"w-{number}")
        assert spawned(effects) == []
        wake = next(effect.at_seconds for effect in effects if isinstance(effect, WakeAt))
        pauses.append(wake - desk.now)
        assert spawned(desk.take(Tick(), after=pauses[-1])) == [f"w-{number + 1}"]

    assert pauses == [1.0, 2.0, 4.0, 4.0, 4.0]


def test_a_pool_worker_that_was_stable_starts_the_back_off_anew() -> None:
    desk = Desk(first_backoff_seconds=1.0, stable_seconds=30.0)
    desk.take(Tick())
    desk.exit("w-1")
    desk.take(Tick(), after=1.0)
    desk.warm("w-2")
    desk.exit("w-2", after=30.0)

    assert desk.state.spawn_not_before_seconds == desk.now + 1.0


def test_a_load_that_succeeds_ends_the_back_off() -> None:
    desk = Desk(first_backoff_seconds=1.0)
    desk.take(Tick())
    desk.exit("w-1")
    desk.take(Tick(), after=1.0)
    desk.ready()

    assert desk.state.pool_failures == 0


@given(st.integers(0, 10_000))
def test_the_back_off_never_shrinks_and_is_bounded(failures: int) -> None:
    policy = Policy(devices=(0,), worker_prefix="w")

    assert backoff_seconds(policy, failures) <= backoff_seconds(policy, failures + 1) <= 30.0


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


# --- replicas that take sessions while their weights arrive ---


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


# --- replicas of several ranks ---


def start_ranks(desk: Desk, replica: str = "rep-1", devices: tuple[int, ...] = (0, 1)) -> tuple[Effect, ...]:
    """Order a replica whose checkpoint is cut for two ranks."""
    order = StartReplicaRequest(replica_id=replica, devices=devices, fence=1)
    order.checkpoint.tensor_parallel = 2
    return desk.take(StartOrdered(order=order))


def ranks_ready(desk: Desk) -> tuple[str, str]:
    """Bring a replica of two ranks up; returns its workers."""
    start_ranks(desk)
    for worker in desk.spawning():
        desk.warm(worker)
    first, second = [w.worker_id for w in desk.state.workers.values() if w.replica_id == "rep-1"]
    desk.loaded(second)
    desk.loaded(first)
    return first, second


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
