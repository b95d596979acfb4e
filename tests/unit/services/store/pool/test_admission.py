"""Who gets room in the pool."""

from __future__ import annotations

import pytest

from services.store.pool.admission import Admitted, Pool, Refused, Waits, admit
from services.store.pool.eviction import Occupant, Uses
from stoker.errors import CapacityError, DoesNotFit
from stoker.units import MIB


def occupant(key: int, chunks: int, *, held: bool = False) -> Occupant:
    return Occupant(
        key=key, chunks=chunks, reload_seconds=chunks, uses=Uses(count=1.0, at_seconds=0.0), held=held
    )


def decide(need: int, *, total: int = 10, free: int = 0, draining: int = 0, occupants=()):
    pool = Pool(
        total_chunks=total,
        free_chunks=free,
        draining_chunks=draining,
        chunk_bytes=16 * MIB,
        occupants=occupants,
    )
    return admit(pool, uri="/models/a", need_chunks=need, now_seconds=0.0)


@pytest.mark.parametrize(
    ("name", "decision", "expected"),
    [
        ("room is free", decide(4, free=4), Admitted(evict=())),
        ("an idle one makes room", decide(4, free=1, occupants=[occupant(7, 9)]), Admitted(evict=(7,))),
        ("an aborted load is about to give back", decide(4, free=1, draining=3), Waits()),
        ("waiting is better than dropping", decide(2, draining=3, occupants=[occupant(7, 7)]), Waits()),
        (
            "only what waiting does not give is dropped",
            decide(6, draining=3, occupants=[occupant(7, 3), occupant(8, 4)]),
            Admitted(evict=(7,)),
        ),
        ("nothing is needed", decide(0), Admitted(evict=())),
    ],
)
def test_room_is_found(name: str, decision: object, expected: object):
    assert decision == expected, name


def test_what_is_larger_than_the_pool_never_fits():
    """The message names both sizes and the setting to change."""
    match decide(11, free=10):
        case Refused(error=DoesNotFit(message=message)):
            assert message == (
                "/models/a takes 184.5 MB, the store's whole pool has 167.8 MB; raise STOKER_STORE_POOL_BYTES"
            )
        case other:
            pytest.fail(str(other))


def test_a_pool_held_by_running_models_refuses_for_now():
    match decide(5, free=2, occupants=[occupant(1, 8, held=True)]):
        case Refused(error=CapacityError(retry_after_seconds=after, details=details) as error):
            assert type(error) is CapacityError
            assert after == 5.0
            assert details["held_bytes"] == 8 * 16 * MIB
        case other:
            pytest.fail(str(other))
