"""Idempotency keys: names that every gateway gives alike, ids of events, what a client has not seen yet."""

from __future__ import annotations

import pytest

from services.gateway.sessions.request_key import (
    RequestKey,
    Seen,
    after_delta,
    event_ids,
    feed_unseen,
    read_key,
    revision_tag,
)
from services.gateway.sessions.session import Delta, Session
from stoker.errors import InvalidRequest
from stoker.v1 import session_pb2
from tests.unit.services.gateway.builders import END, ids_of, session

LENGTH, STOP = session_pb2.FINISH_REASON_LENGTH, session_pb2.FINISH_REASON_STOP


def key(value: str = "k1", last: str | None = None, **changed: object) -> RequestKey:
    fields = {"owner": "Bearer a", "path": "/v1/completions", "body": b"{}"} | changed
    found = read_key(value, last, **fields)  # type: ignore[arg-type]
    assert found is not None
    return found


def event(text: str, position: int = 0, finish: int = 0, *, end: bool = False) -> session_pb2.GenerateEvent:
    ids = [*ids_of(text), *([END] if end else [])]
    tokens = [session_pb2.Token(id=token) for token in ids]
    return session_pb2.GenerateEvent(position=position, tokens=tokens, finish_reason=finish)  # type: ignore[arg-type]


def test_every_gateway_gives_a_keys_sessions_the_same_names_and_seed() -> None:
    assert key().session_id(1) == key().session_id(1)
    assert key().seed == key().seed
    assert key().session_id(0) != key().session_id(1)


def test_another_owners_key_of_the_same_text_is_another_key() -> None:
    assert key().name != key(owner="Bearer b").name


def test_another_body_or_path_has_another_fingerprint_under_the_same_name() -> None:
    assert key().name == key(body=b"{ }").name
    assert len({key().fingerprint, key(body=b"{ }").fingerprint, key(path="/x").fingerprint}) == 3


def test_an_event_id_says_what_its_reader_has() -> None:
    seen = (Seen(tokens=12), Seen(tokens=7, has_end=True), Seen(tokens=3, has_end=True, has_finish=True))
    text = event_ids(revision_tag("r1"), seen)

    assert text == revision_tag("r1") + ":12,7t,3f"
    assert key(last=text).seen == seen
    assert key(last=text).revision_tag == revision_tag("r1")


@pytest.mark.parametrize("last", ["12", "abc:1", "01234567:", "01234567:1,", "01234567:x", "01234567:1" * 9])
def test_an_event_id_that_is_none_is_refused(last: str) -> None:
    with pytest.raises(InvalidRequest, match="Last-Event-ID"):
        key(last=last)


@pytest.mark.parametrize("value", ["", "x" * 256, "a b", "ä"])
def test_a_key_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        key(value)


def test_an_event_id_without_a_key_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="without Idempotency-Key"):
        read_key(None, "01234567:1", owner="", path="/", body=b"")


def test_of_the_messages_of_a_last_delta_only_the_last_one_has_the_finish() -> None:
    last = Delta(text="x", finish_reason="length", received=4)

    assert after_delta(2, 0, last) == Seen(tokens=4, has_end=True)
    assert after_delta(2, 1, last) == Seen(tokens=4, has_end=True, has_finish=True)
    assert after_delta(1, 0, Delta(text="x", received=2)) == Seen(tokens=2)


@pytest.mark.parametrize("seen_tokens", range(6))
@pytest.mark.parametrize("cut", range(1, 6))
def test_what_was_seen_and_what_follows_are_the_whole_answer_wherever_the_events_are_cut(
    seen_tokens: int, cut: int
) -> None:
    text = "häx✓z"  # characters of several tokens
    whole = _texts(session(max_tokens=50), [event(text, finish=LENGTH)], Seen())
    ids = len(ids_of(text))
    first = session(max_tokens=50)
    before = first.feed(session_pb2.GenerateEvent(tokens=event(text).tokens[:seen_tokens])).text

    again, events = session(max_tokens=50), []
    for begin in range(0, ids, cut):
        part = session_pb2.GenerateEvent(position=begin, tokens=event(text).tokens[begin : begin + cut])
        part.finish_reason = LENGTH if begin + cut >= ids else 0  # type: ignore[assignment]
        events.append(part)

    assert before + _texts(again, events, Seen(tokens=seen_tokens)) == whole == text
    assert again.finish_reason == "length"


def _texts(stream: Session, events: list[session_pb2.GenerateEvent], seen: Seen) -> str:
    return "".join(feed_unseen(stream, each, seen).text for each in events)


def test_who_has_all_the_text_gets_only_the_finish_and_who_has_that_too_gets_nothing() -> None:
    only_finish = feed_unseen(session(), event("ab", finish=LENGTH), Seen(tokens=2, has_end=True))
    nothing = feed_unseen(
        session(), event("ab", finish=LENGTH), Seen(tokens=2, has_end=True, has_finish=True)
    )

    assert (only_finish.text, only_finish.finish_reason) == ("", "length")
    assert (nothing.text, nothing.finish_reason) == ("", None)


def test_a_stop_token_is_never_shown_as_text() -> None:
    delta = feed_unseen(session(), event("ab", finish=STOP, end=True), Seen(tokens=2))

    assert (delta.text, delta.finish_reason) == ("", "stop")
