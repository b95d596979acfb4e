"""Sorted lists kept in runs have the items of a plain sorted list, whatever came and went."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.controller.cluster_view.ladder import RUN, Ladder

ITEMS = st.tuples(st.sampled_from((0.0, 1.0, 2.5)), st.sampled_from("abcdefgh"))


@settings(max_examples=60, deadline=None)
@given(st.sets(ITEMS), st.lists(st.tuples(st.sampled_from(("add", "remove", "move")), ITEMS, ITEMS)))
def test_a_ladder_has_the_items_of_a_sorted_list(
    begin: set[tuple[float, str]], steps: list[tuple[str, tuple[float, str], tuple[float, str]]]
) -> None:
    ladder, items = Ladder.of(begin), set(begin)

    for verb, item, other in steps:
        if verb == "add" and item not in items:
            ladder, items = ladder.added(item), items | {item}
        elif verb == "remove":
            ladder, items = ladder.removed(item), items - {item}
        elif verb == "move" and other not in items - {item}:
            ladder, items = ladder.moved(item, other), (items - {item}) | {other}
        assert list(ladder) == sorted(items)


def test_runs_are_cut_before_they_are_long_and_go_when_they_are_empty() -> None:
    numbers = [(float(number * 7919 % 1000), "n") for number in range(1000)]
    ladder: Ladder[tuple[float, str]] = Ladder()

    for number in numbers:
        ladder = ladder.added(number)
    assert all(0 < len(run) <= RUN for run in ladder.runs)
    for number in numbers:
        ladder = ladder.removed(number)

    assert ladder.runs == ()
