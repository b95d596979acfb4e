"""Leadership: a key on a lease, and a fence in every write the leader makes.

Theory of operation: a candidate creates the election's key, on its lease, if there is none; who succeeds
leads *term* `create_revision` until the key is gone. Everybody else watches the key. Terms only grow,
because revisions do.

A lease alone is not safe: a leader that is paused for longer than its lease wakes up believing it leads. So a
leader writes only through `FencedState`, which adds to each transaction the compare "the election's key was
created by my term". The store itself refuses what an old leader sends.
"""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.background import background
from stoker.errors import Fenced
from stoker.state.errors import StateUnavailable
from stoker.state.protocol import (
    DEFAULT_TIMEOUT_SECONDS,
    Changes,
    Committed,
    Compare,
    Conflict,
    CreateRevisionIs,
    Outcome,
    Put,
    Resync,
    StateStore,
    Stored,
    Versioned,
    WatchEvent,
    Write,
    absent,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

DEFAULT_TTL_SECONDS = 5.0
RELEASE_TIMEOUT_SECONDS = 1.0
"""How long a leader that ends tries to tell the others; without it they wait for its lease to expire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """Who leads.

    Attributes:
        identity: What the leader said of itself when it campaigned, e.g. its address.
        term: The revision that made it leader; larger than that of every leader before.
    """

    identity: bytes
    term: int


class FencedState:
    """The state as its leader may write it: each transaction holds only while the term lasts.

    Args:
        store: The state.
        election_key: The key of the election.
        leader: The term won.
    """

    def __init__(self, store: StateStore, *, election_key: str, leader: Leader) -> None:
        self.store = store
        self.leader = leader
        self._fence = CreateRevisionIs(key=election_key, revision=leader.term)

    async def transact(
        self,
        compares: Sequence[Compare],
        writes: Sequence[Write],
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> Outcome:
        """Write everything if every compare holds and this leader still leads; see the protocol.

        Raises:
            Fenced: Another term has begun, or none: stop deciding. Nothing was written.
            InvalidRequest: As the protocol says; one compare fewer fits.
            LeaseLost: As the protocol says.
            StateUnavailable: As the protocol says.
        """
        outcome = await self.store.transact((self._fence, *compares), writes, timeout_seconds=timeout_seconds)
        if isinstance(outcome, Conflict):
            if self._fence in outcome.failed:
                raise Fenced(
                    f"term {self.leader.term} of {self._fence.key} is over: this controller no longer leads "
                    "and nothing was written"
                )
            found = dict(outcome.found)
            if all(compare.key != self._fence.key for compare in compares):
                del found[self._fence.key]
            return Conflict(revision=outcome.revision, failed=outcome.failed, found=found)
        return outcome


@asynccontextmanager
async def campaign(
    store: StateStore, election_key: str, *, identity: bytes, ttl_seconds: float = DEFAULT_TTL_SECONDS
) -> AsyncGenerator[FencedState, None]:
    """Wait until this candidate leads, run the block as leader, and resign when it ends.

    When leadership is lost the block is cancelled and `LeaseLost` or `Fenced` raised in its place; campaign
    again.

    Args:
        store: The state.
        election_key: What is led, the same for all candidates.
        identity: What `observe` tells the others.
        ttl_seconds: How long the others wait when this process dies.

    Raises:
        LeaseLost: The lease could not be kept.
        Fenced: The election's key was taken away.
        StateUnavailable: The state did not answer while campaigning.
    """
    lease = await store.grant(ttl_seconds)
    try:
        async with lease.keep_alive():
            put = Put(key=election_key, value=identity, lease_id=lease.id)
            leader = await _win(store, put)
            async with background() as tasks:
                tasks.start(_until_deposed(store, election_key, leader), name="leadership-watch")
                yield FencedState(store, election_key=election_key, leader=leader)
    finally:
        with suppress(StateUnavailable):
            await lease.revoke(timeout_seconds=RELEASE_TIMEOUT_SECONDS)


async def observe(store: StateStore, election_key: str) -> AsyncGenerator[Leader | None, None]:
    """Iterate over who leads: first who does now, then each change; None while nobody does.

    Raises:
        StateUnavailable: The store was closed.
    """
    async with aclosing(store.watch(election_key)) as events:
        async for event in events:
            for leader in leaders_of(event, election_key):
                yield leader


def leaders_of(event: WatchEvent, election_key: str) -> list[Leader | None]:
    """Return what an event of a watch on the election's key says about who leads, in order."""
    match event:
        case Resync(snapshot=snapshot):
            items = [item for item in snapshot.items if item.key == election_key]
            return [_leader(item) for item in items] or [None]
        case Changes(changes=changes):
            return [
                _leader(change.item) if isinstance(change, Stored) else None
                for change in changes
                if change.key == election_key
            ]


def _leader(item: Versioned) -> Leader:
    return Leader(identity=item.value, term=item.create_revision)


async def _win(store: StateStore, put: Put) -> Leader:
    """Create the election's key as soon as there is none."""
    async with aclosing(observe(store, put.key)) as leaders:
        async for leader in leaders:
            if leader is None:
                outcome = await store.transact([absent(put.key)], [put])
                if isinstance(outcome, Committed):
                    return Leader(identity=put.value, term=outcome.revision)
    raise StateUnavailable(f"the watch on {put.key} ended before this candidate won: campaign again")


async def _until_deposed(store: StateStore, election_key: str, mine: Leader) -> None:
    async with aclosing(observe(store, election_key)) as leaders:
        async for leader in leaders:
            if leader is None or leader.term != mine.term:
                now = f"term {leader.term} has begun" if leader else "the election's key is gone"
                raise Fenced(f"term {mine.term} of {election_key} is over, {now}: this one stops leading")
