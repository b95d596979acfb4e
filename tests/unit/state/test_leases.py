"""The holder of a lease knows that it is lost before others may."""

from __future__ import annotations

import asyncio

import pytest

from stoker.clock import ManualClock
from stoker.state import Lease, LeaseId, LeaseLost, StateUnavailable

TTL_SECONDS = 9.0


class Store:
    """Renews while it is reachable."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.reachable = True
        self.renewed_seconds: list[float] = []

    async def renew(self, lease_id: LeaseId, *, timeout_seconds: float = 5.0) -> None:
        """Note when, or fail."""
        if not self.reachable:
            raise StateUnavailable("down")
        self.renewed_seconds.append(self.clock.now_seconds())

    async def revoke(self, lease_id: LeaseId, *, timeout_seconds: float = 5.0) -> None:
        """Nothing to do."""


async def advance(clock: ManualClock, seconds: int) -> None:
    """Let time pass second by second."""
    await settle()
    for _ in range(seconds):
        clock.advance(1)
        await settle()


async def settle() -> None:
    """Let tasks run up to their next wait."""
    for _ in range(5):
        await asyncio.sleep(0)


def lease_of(store: Store) -> Lease:
    """Return a lease just granted."""
    return Lease(
        LeaseId(1),
        ttl_seconds=TTL_SECONDS,
        granted_seconds=store.clock.now_seconds(),
        store=store,
        clock=store.clock,
    )


async def test_a_lease_is_renewed_three_times_per_its_time() -> None:
    store = Store(ManualClock(0))
    async with lease_of(store).keep_alive():
        await advance(store.clock, 18)

    assert store.renewed_seconds == [3, 6, 9, 12, 15, 18]


async def test_a_state_that_is_back_shortly_before_the_lease_is_over_saves_it() -> None:
    store = Store(ManualClock(0))
    async with lease_of(store).keep_alive():
        await advance(store.clock, 4)
        store.reachable = False
        await advance(store.clock, 6)
        store.reachable = True
        await advance(store.clock, 4)

    assert store.renewed_seconds == [3, 11, 14]


async def test_an_outage_as_long_as_the_lease_cancels_the_block_at_the_moment_it_is_over() -> None:
    store = Store(ManualClock(0))
    cancelled_seconds = []

    async def protected() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled_seconds.append(store.clock.now_seconds())

    async def hold() -> None:
        async with lease_of(store).keep_alive():
            await protected()

    holding = asyncio.create_task(hold())
    await advance(store.clock, 4)
    store.reachable = False
    await advance(store.clock, 20)

    with pytest.raises(LeaseLost, match="9 s"):
        await holding
    assert cancelled_seconds == [3 + TTL_SECONDS]


async def test_cancelling_the_holder_is_a_cancellation() -> None:
    store = Store(ManualClock(0))

    async def hold() -> None:
        async with lease_of(store).keep_alive():
            await asyncio.Event().wait()

    holding = asyncio.create_task(hold())
    await advance(store.clock, 1)
    holding.cancel()

    with pytest.raises(asyncio.CancelledError):
        await holding
