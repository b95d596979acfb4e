"""What goes when room is needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.store.pool.eviction import HALF_LIFE_SECONDS, Occupant, Uses, choose_victims

NOW = 10_000.0


def occupant(key: int, *, chunks: int = 1, reload: float = 1.0, uses: float = 1.0, age: float = 0.0, **rest):
    """An occupant; `age` is seconds since its uses were counted."""
    return Occupant(
        key=key,
        chunks=chunks,
        reload_seconds=reload,
        uses=Uses(count=uses, at_seconds=NOW - age),
        held=rest.get("held", False),
        superseded=rest.get("superseded", False),
    )


def test_the_least_used_goes_first():
    victims = choose_victims(
        [occupant(1, uses=5), occupant(2, uses=1), occupant(3, uses=3)], need_chunks=1, now_seconds=NOW
    )

    assert victims == (2,)


def test_old_uses_fade():
    """Sixteen uses five half-lives ago are worth less than one use now."""
    often_long_ago = occupant(1, uses=16, age=5 * HALF_LIFE_SECONDS)

    assert choose_victims([often_long_ago, occupant(2)], need_chunks=1, now_seconds=NOW) == (1,)


def test_what_is_quick_to_bring_back_goes_before_what_is_slow():
    slow, quick = occupant(1, reload=30), occupant(2, reload=3)

    assert choose_victims([slow, quick], need_chunks=1, now_seconds=NOW) == (2,)


def test_held_ones_stay_even_if_nothing_else_is_left():
    assert choose_victims([occupant(1, held=True, chunks=9)], need_chunks=1, now_seconds=NOW) is None


def test_a_superseded_revision_goes_before_anything_that_can_be_asked_for():
    old = occupant(1, uses=100, superseded=True)

    assert choose_victims([old, occupant(2, uses=0.1)], need_chunks=1, now_seconds=NOW) == (1,)


def test_a_small_victim_is_spared_when_a_large_one_turns_out_to_be_needed_anyway():
    small, large = occupant(1, chunks=1, uses=1), occupant(2, chunks=8, reload=16, uses=1)

    assert choose_victims([small, large], need_chunks=8, now_seconds=NOW) == (2,)


def test_no_need_no_victim():
    assert choose_victims([occupant(1)], need_chunks=0, now_seconds=NOW) == ()


occupants = st.lists(
    st.tuples(st.integers(1, 9), st.floats(0, 9), st.floats(0, 9), st.booleans()), max_size=12
)


@given(occupants, st.integers(1, 60))
def test_victims_are_enough_unheld_and_all_needed(drawn, need: int):
    found = [
        occupant(key, chunks=chunks, reload=reload, uses=uses, held=held)
        for key, (chunks, reload, uses, held) in enumerate(drawn)
    ]
    by_key = {each.key: each for each in found}

    victims = choose_victims(found, need_chunks=need, now_seconds=NOW)

    if victims is None:
        assert sum(each.chunks for each in found if not each.held) < need
        return
    freed = sum(by_key[key].chunks for key in victims)
    assert freed >= need
    assert not any(by_key[key].held for key in victims)
    assert all(freed - by_key[key].chunks < need for key in victims)
