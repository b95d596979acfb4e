"""Stop strings end a text the same way however it is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.text.stop_strings import StopFilter

LETTERS = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


def shown(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    stop_filter = StopFilter(stops)
    out = [stop_filter.push(piece) for piece in pieces]
    if stop_filter.matched is None:
        out.append(stop_filter.flush())
    return out, stop_filter.matched


@given(LETTERS, STOPS, st.data())
def test_the_cut_does_not_matter(text: str, stops: list[str], data: st.DataObject) -> None:
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]

    cut, cut_match = shown(stops, pieces)
    by_letter, letter_match = shown(stops, list(text))
    assert ("".join(cut), cut_match) == ("".join(by_letter), letter_match)


@given(LETTERS, STOPS)
def test_what_is_shown_ends_before_the_first_complete_stop_string(text: str, stops: list[str]) -> None:
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]

    out, _ = shown(stops, list(text))
    assert "".join(out) == (text[: min(ends)[1]] if ends else text)


@given(LETTERS, STOPS)
def test_no_piece_ever_contains_a_stop_string(text: str, stops: list[str]) -> None:
    out, _ = shown(stops, list(text))

    assert not any(stop in "".join(out) for stop in stops)


def test_what_may_begin_a_stop_string_is_held_back_and_given_out_at_the_end() -> None:
    assert shown(["STOP"], ["x ST", "O"]) == (["x ", "", "STO"], None)


def test_text_that_cannot_begin_one_is_not_delayed() -> None:
    assert shown(["STOP"], ["hello"]) == (["hello", ""], None)


def test_nothing_is_shown_after_a_match() -> None:
    assert shown(["b"], ["ab", "c"]) == (["a", ""], "b")


def test_without_stop_strings_text_passes() -> None:
    assert shown([], ["a", "b"]) == (["a", "b", ""], None)
