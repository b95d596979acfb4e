"""A session's text, tokens and end depend on its tokens alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.sessions.session import Session
from services.gateway.sessions.waited import Waited
from stoker.errors import Fenced, StokerError
from stoker.v1 import model_pb2, session_pb2
from tests.unit.services.gateway.builders import END, event, ids_of, session

STOP, LENGTH = session_pb2.FINISH_REASON_STOP, session_pb2.FINISH_REASON_LENGTH


def play(played: Session, token_ids: list[int], sizes: list[int], finish: int) -> tuple[str, list[object]]:
    """Feed tokens in events of these sizes; return text and scored tokens."""
    deltas, position = [], 0
    while position < len(token_ids) and played.finish_reason is None:
        size = sizes[len(deltas) % len(sizes)]
        chunk = token_ids[position : position + size]
        last = position + size >= len(token_ids)
        deltas.append(played.feed(event(position, chunk, finish=finish if last else 0)))
        position += size
    return "".join(delta.text for delta in deltas), [token for delta in deltas for token in delta.tokens]


def test_the_stop_token_is_counted_and_not_shown() -> None:
    played = session()
    text, _ = play(played, [*ids_of("hi"), END], [1], STOP)

    assert (text, played.finish_reason, len(played.token_ids)) == ("hi", "stop", 3)


def test_a_stop_token_that_is_ordinary_text_is_not_shown_either() -> None:
    text, _ = play(session(), ids_of("hi."), [1], STOP)

    assert text == "hi"


def test_the_last_token_before_the_limit_is_shown() -> None:
    played = session()
    text, _ = play(played, ids_of("hi"), [1], LENGTH)

    assert (text, played.finish_reason) == ("hi", "length")


def test_a_character_cut_by_the_limit_is_shown_as_replaced() -> None:
    text, _ = play(session(), ids_of("é")[:1], [1], LENGTH)

    assert text == "\ufffd"


def test_text_held_for_a_stop_string_is_shown_at_the_end() -> None:
    text, _ = play(session(stop=["STOP"]), ids_of("x ST"), [1], LENGTH)

    assert text == "x ST"


def test_a_stop_string_ends_the_session_at_the_token_that_completes_it() -> None:
    played = session(stop=["STOP"])
    delta = played.feed(event(0, ids_of("a STOP b")))

    assert (delta.text, delta.finish_reason, len(played.token_ids)) == ("a ", "stop", 6)


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    text, _ = play(session(stop=["b"], min_tokens=4), ids_of("abcdab"), [1], LENGTH)

    assert text == "abcda"


@given(
    st.text(alphabet="abSTOP é😀", max_size=20),
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.sampled_from([(), ("STOP",), ("b", "OP")]),
)
def test_how_tokens_are_cut_into_events_changes_nothing(
    text: str, sizes: list[int], stop: tuple[str]
) -> None:
    token_ids = [*ids_of(text), END]

    in_pieces = play(session(stop=stop, top_logprobs=1), token_ids, sizes, STOP)
    at_once = play(session(stop=stop, top_logprobs=1), token_ids, [len(token_ids)], STOP)
    assert in_pieces == at_once


@given(st.text(alphabet="abé😀", min_size=1, max_size=10))
def test_scored_tokens_cover_exactly_the_text(text: str) -> None:
    shown, tokens = play(session(top_logprobs=1), [*ids_of(text), END], [1], STOP)

    assert b"".join(token.raw for token in tokens).decode() == shown == text
    assert [token.offset for token in tokens] == sorted(token.offset for token in tokens)


def test_tokens_of_a_stop_string_are_not_scored() -> None:
    _, tokens = play(session(stop=["ST"], top_logprobs=0), ids_of("a STx"), [1], LENGTH)

    assert b"".join(token.raw for token in tokens) == b"a "


def test_an_order_carries_all_there_is_to_know() -> None:
    played = session()
    played.feed(event(0, ids_of("hi")))
    played.epoch = 2
    order = played.generate_request(model="m", replica_id="r", request_id="q")

    assert list(order.prompt_token_ids) == [1, 2]
    assert list(order.generated_token_ids) == ids_of("hi")
    assert (order.epoch, order.session_id, order.sampling.seed) == (2, "ses-1", 7)


def test_another_replica_continues_where_the_first_stopped() -> None:
    played = session()
    first = played.feed(event(0, ids_of("he")))
    played.epoch = 1
    second = played.feed(event(2, [*ids_of("y"), END], finish=STOP, epoch=1))

    assert first.text + second.text == "hey"


def test_tokens_of_an_earlier_owner_are_refused() -> None:
    played = session()
    played.epoch = 1

    with pytest.raises(Fenced):
        played.feed(event(0, [1], epoch=0))


@pytest.mark.parametrize("position", [0, 3])
def test_repeated_or_missing_tokens_are_refused(position: int) -> None:
    played = session()
    played.feed(event(0, ids_of("he")))

    with pytest.raises(StokerError, match="missing or repeated"):
        played.feed(event(position, [1]))


def test_a_cancelled_session_is_an_error_to_whoever_still_listens() -> None:
    with pytest.raises(StokerError, match="gave up"):
        session().feed(event(0, [], finish=session_pb2.FINISH_REASON_CANCELLED))


def test_every_replica_is_told_the_sessions_adapter() -> None:
    adapter = model_pb2.AdapterSpec(name="poet", uri="/adapters/poet", revision="a1")
    going = session()
    going.adapter = adapter

    orders = [
        going.generate_request(model="tiny", replica_id=replica, request_id="r")
        for replica in ("one", "other")
    ]

    assert [order.adapter for order in orders] == [adapter, adapter]
    assert not session().generate_request(model="tiny", replica_id="one", request_id="r").HasField("adapter")


def test_an_order_tells_how_long_the_session_has_waited() -> None:
    waiting = session()
    waiting.waited = Waited(since_seconds=10.0)

    order = waiting.generate_request(model="m", replica_id="r", request_id="q", now_seconds=14.0)

    assert order.waited_seconds == 4.0
