"""Leases as their holder sees them: kept alive while a block runs, and known to be lost before others know.

The holder counts the lease's time from before each renewal was *sent*, the store from when it arrived. So the
holder's clock runs out first: what runs under `keep_alive` is cancelled before the store gives the keys away,
as long as the process itself is not paused. A process that may be paused needs fencing too: see `election`.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from stoker.background import background
from stoker.state.errors import LeaseLost, StateUnavailable
from stoker.state.protocol import DEFAULT_TIMEOUT_SECONDS, LeaseId

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from stoker.clock import Clock

RENEWALS_PER_TTL = 3
"""As etcd's own client does."""
RETRIES_PER_TTL = 9
"""After a renewal that failed: a state that is back a ninth of the lease before it is over saves it."""


class LeaseStore(Protocol):
    """The part of a store a lease needs."""

    async def renew(self, lease_id: LeaseId, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """Give the lease its whole time again."""
        ...

    async def revoke(self, lease_id: LeaseId, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """End the lease and delete its keys."""
        ...


class Lease:
    """A lease just granted; put its `id` on keys with `Put(lease_id=...)`.

    Args:
        lease_id: What the store calls it.
        ttl_seconds: How long it lives without renewal, as the store granted it.
        granted_seconds: The clock before the grant was asked for.
        store: Who granted it.
        clock: The holder's time.
    """

    def __init__(
        self,
        lease_id: LeaseId,
        *,
        ttl_seconds: float,
        granted_seconds: float,
        store: LeaseStore,
        clock: Clock,
    ) -> None:
        self.id = lease_id
        self.ttl_seconds = ttl_seconds
        self._expires_seconds = granted_seconds + ttl_seconds
        self._store = store
        self._clock = clock

    @asynccontextmanager
    async def keep_alive(self) -> AsyncGenerator[None, None]:
        """Renew the lease while the block runs; the lease itself outlives the block until it expires.

        When the lease is lost the block is cancelled and `LeaseLost` raised in its place. Errors of the block
        come out as they are.

        Raises:
            LeaseLost: The store ended the lease, or no renewal succeeded for its whole time.
        """
        async with background() as tasks:
            tasks.start(self._renew_until_lost(), name=f"lease-{self.id}")
            yield

    async def revoke(self, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """End the lease now and delete its keys.

        Raises:
            StateUnavailable: No answer in time; the lease ends by itself.
        """
        await self._store.revoke(self.id, timeout_seconds=timeout_seconds)

    async def _renew_until_lost(self) -> None:
        interval_seconds = self.ttl_seconds / RENEWALS_PER_TTL
        pause_seconds = interval_seconds
        while True:
            await self._clock.sleep(min(pause_seconds, self._remaining_seconds()))
            remaining_seconds = self._remaining_seconds()
            if remaining_seconds <= 0:
                raise LeaseLost(
                    f"lease {self.id} could not be renewed for its {self.ttl_seconds:g} s: the state is "
                    "unreachable or too slow; what it protected must stop"
                )
            sent_seconds = self._clock.now_seconds()
            try:
                await self._store.renew(self.id, timeout_seconds=min(interval_seconds, remaining_seconds))
            except StateUnavailable:
                pause_seconds = self.ttl_seconds / RETRIES_PER_TTL
            else:
                pause_seconds = interval_seconds
                self._expires_seconds = sent_seconds + self.ttl_seconds

    def _remaining_seconds(self) -> float:
        return self._expires_seconds - self._clock.now_seconds()
