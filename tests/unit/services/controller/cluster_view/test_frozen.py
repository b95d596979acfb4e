"""Values made and copied the fast way are what their constructors and `replace` give."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field, replace

import pytest

from services.controller.cluster_view.frozen import amender_of, changed, draft_of, finished, maker_of
from services.controller.cluster_view.index import Index
from services.controller.cluster_view.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """Something with defaults of both kinds."""

    name: str
    parts: tuple[int, ...] = ()
    known: dict[str, int] = field(default_factory=dict)


def test_a_made_value_is_the_constructor_s() -> None:
    make = maker_of(Value)

    assert make(name="a", parts=(1,)) == Value(name="a", parts=(1,))
    assert make(name="a").known is not make(name="b").known


def test_a_changed_copy_is_what_replace_gives_and_the_value_stays() -> None:
    view = View(room=3)

    assert changed(view, room=4) == replace(view, room=4)
    assert type(changed(view, room=4)) is View
    assert view.room == 3


def test_an_amended_copy_is_what_replace_gives_and_the_value_stays() -> None:
    amend, view = amender_of(View, "room", "room_settled"), View(room=3)

    assert amend(view, 4, 5) == replace(view, room=4, room_settled=5)
    assert type(amend(view, 4, 5)) is View
    assert view.room == 3


def test_a_field_that_a_class_lacks_can_not_be_amended() -> None:
    with pytest.raises(AttributeError, match="View has no field 'rooms'"):
        amender_of(View, "rooms")


def test_what_is_finished_can_not_be_changed_any_more() -> None:
    made = maker_of(Value)(name="a")
    index = finished(draft_of(Index()), Index)

    with pytest.raises(FrozenInstanceError):
        made.name = "b"  # type: ignore[misc]  # what the test is about
    with pytest.raises(FrozenInstanceError):
        index.shapes = index.shapes  # type: ignore[misc]  # likewise


def test_a_field_that_there_is_not_is_refused() -> None:
    with pytest.raises(AttributeError):
        changed(View(), rooms=4)
