"""Groups give what sorting every change in at once would have given, however they are asked."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.cluster_view.groups import MOST_CHANGES, Groups
from services.controller.cluster_view.holdings import held_changes
from services.controller.cluster_view.view import Held
from stoker.ids import CheckpointUri, NodeId, Revision

MOVES = st.lists(st.tuples(st.sampled_from("abc"), st.sets(st.sampled_from("xyz"))), max_size=12)
HOLDINGS = st.dictionaries(st.sampled_from("uvwx"), st.integers(0, 2), max_size=4)


@settings(max_examples=50, deadline=None)
@given(MOVES, st.sets(st.integers(0, 12)))
def test_groups_are_those_of_plain_sets_whenever_somebody_asks(
    moves: list[tuple[str, set[str]]], asked: set[int]
) -> None:
    groups: Groups[str] = Groups()
    has: dict[str, set[str]] = {}
    for number, (name, now) in enumerate(moves):
        was = has.get(name, set())
        groups = groups.moved(NodeId(name), was - now, now - was)
        has[name] = now
        if number in asked:
            assert set(groups.get("x")) == {each for each, keys in has.items() if "x" in keys}

    for key in "xyz":
        assert set(groups.get(key)) == {each for each, keys in has.items() if key in keys}


def test_a_copy_made_before_somebody_asked_is_not_changed_by_it() -> None:
    one = Groups[str]().moved(NodeId("a"), (), ("x",))
    two, other = one.moved(NodeId("b"), (), ("x",)), one.moved(NodeId("c"), (), ("x",))

    assert set(two.get("x")) == {"a", "b"}
    assert set(one.get("x")) == {"a"}
    assert set(other.get("x")) == {"a", "c"}


def test_changes_that_nobody_asks_about_are_bounded() -> None:
    groups: Groups[str] = Groups()
    for number in range(3 * MOST_CHANGES):
        groups = groups.moved(NodeId(f"n{number}"), (), ("x",))

    assert len(groups._noted) <= MOST_CHANGES
    assert len(groups.get("x")) == 3 * MOST_CHANGES


@given(HOLDINGS, HOLDINGS)
def test_changed_holdings_are_those_that_differ(before: dict[str, int], after: dict[str, int]) -> None:
    was, now = (
        {(CheckpointUri(name), Revision("1")): Held(disk_bytes=size) for name, size in held.items()}
        for held in (before, after)
    )

    told = {name: (old, new) for name, old, new in held_changes(was, now)}
    of_the_same_names = held_changes(was, {key: now.get(key, held) for key, held in was.items()})

    assert told == {
        key: (was.get(key), now.get(key)) for key in was.keys() | now.keys() if was.get(key) != now.get(key)
    }
    assert {key for key, _, _ in of_the_same_names} == {
        key for key in was if now.get(key, was[key]) != was[key]
    }
