"""The manual clock: time stands still until it is told to move."""

from __future__ import annotations

import asyncio

import pytest

from stoker.clock import ManualClock, SystemClock


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_time_moves_only_when_told() -> None:
    clock = ManualClock(start_seconds=100.0)

    clock.advance(2.5)

    assert (clock.now_seconds(), clock.unix_seconds()) == (102.5, 102.5)


def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="does not go back: -1"):
        ManualClock().advance(-1)


async def test_a_sleeper_wakes_when_its_time_has_come_and_not_before() -> None:
    clock = ManualClock()
    sleeping = asyncio.create_task(clock.sleep(10))
    await settle()

    clock.advance(9.9)
    await settle()
    early = sleeping.done()
    clock.advance(0.1)
    await settle()

    assert (early, sleeping.done()) == (False, True)


async def test_one_step_wakes_all_it_passes_in_the_order_of_their_times() -> None:
    clock, woken = ManualClock(), list[int]()

    async def sleep(seconds: int) -> None:
        await clock.sleep(seconds)
        woken.append(seconds)

    sleepers = [asyncio.create_task(sleep(seconds)) for seconds in (3, 1, 2, 9)]
    await settle()

    clock.advance(5)
    await settle()

    assert woken == [1, 2, 3]
    sleepers[-1].cancel()


async def test_a_sleeper_that_was_cancelled_is_passed_over() -> None:
    clock = ManualClock()
    cancelled, other = (asyncio.create_task(clock.sleep(1)) for _ in range(2))
    await settle()
    cancelled.cancel()
    await settle()

    clock.advance(1)
    await settle()

    assert (cancelled.cancelled(), other.done()) == (True, True)


@pytest.mark.parametrize("clock", [ManualClock(), SystemClock()])
async def test_sleeping_for_no_time_lets_others_run(clock: ManualClock | SystemClock) -> None:
    ran = asyncio.Event()
    asyncio.get_running_loop().call_soon(ran.set)

    await clock.sleep(-1)

    assert ran.is_set()


def test_the_systems_clock_never_goes_back() -> None:
    clock = SystemClock()

    assert clock.now_seconds() <= clock.now_seconds()
