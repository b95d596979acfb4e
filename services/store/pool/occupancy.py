"""The pool as admission and eviction see it, made from its residents. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from services.store.pool.admission import Pool
from services.store.pool.eviction import Occupant
from services.store.pool.resident import Phase, Resident
from services.store.reading.read_queue import Urgency
from stoker.units import GB

ASSUMED_BYTES_PER_SECOND = 1.0 * GB
"""Of a tier that was never read from; only the order of evictions depends on it."""


def is_held(resident: Resident, pinned: Collection[str]) -> bool:
    """Tell whether a resident must stay: leased, waited for, or pinned (by uri) and current."""
    is_pinned = resident.entry.uri in pinned and not resident.superseded
    return bool(resident.leases or resident.demand_waiters or is_pinned)


def pool_as_seen(  # noqa: PLR0913 - all that a decision about room looks at
    residents: Iterable[Resident],
    *,
    asking: Resident,
    free_chunks: int,
    total_chunks: int,
    chunk_bytes: int,
    pinned: Collection[str],
    bytes_per_second: Callable[[Resident], float],
) -> Pool:
    """Return what `admit` needs.

    Args:
        residents: All that have chunks, also those that are gone and not settled.
        asking: Who wants room; only a demand may end a load that is under way, and who wants free room only
            gets nobody's.
        free_chunks: Nobody's.
        total_chunks: All.
        chunk_bytes: Of one.
        pinned: Uris.
        bytes_per_second: How fast a resident would come back.
    """
    others = [each for each in residents if each is not asking]
    return Pool(
        total_chunks=total_chunks,
        free_chunks=free_chunks,
        draining_chunks=sum(
            each.chunk_count for each in others if each.phase is Phase.GONE and not each.leases
        ),
        chunk_bytes=chunk_bytes,
        occupants=[
            Occupant(
                key=each.key,
                chunks=each.chunk_count,
                reload_seconds=each.chunk_count * chunk_bytes / bytes_per_second(each),
                uses=each.uses,
                held=each.phase is Phase.GONE
                or is_held(each, pinned)
                or asking.free_room_only
                or (each.phase in {Phase.WAITING, Phase.LOADING} and asking.urgency is Urgency.PREFETCH),
                superseded=each.superseded,
            )
            for each in others
        ],
    )
