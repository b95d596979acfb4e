"""Supervision: workers that wait for orders, and the back-off when they do not start."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.node_agent.host_state import (
    Policy,
    PoolWanted,
    SpawnWorker,
    Tick,
    WakeAt,
    WorkerExited,
)
from services.node_agent.workers.worker_pool import backoff_seconds
from stoker.ids import WorkerId
from tests.unit.services.node_agent.supervision_desk import (
    Desk,
    ended,
    pooled,
    spawned,
)


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
