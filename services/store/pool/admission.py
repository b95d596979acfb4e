"""Whether a checkpoint gets room in the pool, and who goes for it. Pure.

Decision tree:
1. larger than the pool → `Refused` with DoesNotFit: it can never fit;
2. enough chunks are free → `Admitted`;
3. enough once chunks that are still being written by an aborted load are given back → `Waits`;
4. enough when checkpoints that nobody holds are dropped → `Admitted` naming them;
5. otherwise → `Refused` with CapacityError: leases and pins hold the rest; it may fit later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.store.pool.eviction import Occupant, choose_victims
from stoker.errors import CapacityError, DoesNotFit, StokerError
from stoker.units import format_bytes

RETRY_AFTER_SECONDS = 5.0
SETTING = "STOKER_STORE_POOL_BYTES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The pool as it is.

    Attributes:
        total_chunks: All.
        free_chunks: Can be taken now.
        draining_chunks: Become free by themselves as soon as running reads end.
        chunk_bytes: Size of one.
        occupants: What takes the others.
    """

    total_chunks: int
    free_chunks: int
    draining_chunks: int
    chunk_bytes: int
    occupants: Sequence[Occupant]


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """There is room once `evict` have been dropped."""

    evict: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Waits:
    """There will be room as soon as chunks are given back; ask again then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """There is no room; `error` says why."""

    error: StokerError


def admit(pool: Pool, *, uri: str, need_chunks: int, now_seconds: float) -> Admitted | Waits | Refused:
    """Decide; see the module's decision tree.

    Args:
        pool: As it is.
        uri: The checkpoint, for messages.
        need_chunks: What it takes.
        now_seconds: Monotonic.
    """
    need = format_bytes(need_chunks * pool.chunk_bytes)
    total = format_bytes(pool.total_chunks * pool.chunk_bytes)
    if need_chunks > pool.total_chunks:
        return Refused(
            error=DoesNotFit(
                f"{uri} takes {need}, the store's whole pool has {total}; raise {SETTING}",
                details={
                    "need_bytes": need_chunks * pool.chunk_bytes,
                    "pool_bytes": pool.total_chunks * pool.chunk_bytes,
                },
            )
        )
    if need_chunks <= pool.free_chunks:
        return Admitted(evict=())
    missing = need_chunks - pool.free_chunks - pool.draining_chunks
    if missing <= 0:
        return Waits()
    victims = choose_victims(pool.occupants, need_chunks=missing, now_seconds=now_seconds)
    if victims is not None:
        return Admitted(evict=victims)
    held = sum(occupant.chunks for occupant in pool.occupants if occupant.held)
    return Refused(
        error=CapacityError(
            f"{uri} takes {need}; of the store's pool of {total}, {format_bytes(held * pool.chunk_bytes)} "
            f"are held by running models, pins and loads; stop one, or raise {SETTING}",
            retry_after_seconds=RETRY_AFTER_SECONDS,
            details={
                "need_bytes": need_chunks * pool.chunk_bytes,
                "pool_bytes": pool.total_chunks * pool.chunk_bytes,
                "held_bytes": held * pool.chunk_bytes,
            },
        )
    )
