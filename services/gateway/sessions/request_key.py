"""Requests with an idempotency key: their names, what the client has of the answer and what not. Pure.

Everything about such a request follows from its key and its body, so that every gateway would make the same
of it: the sessions' ids, the seed where the client gave none, hence every token. A client that lost its
gateway sends the request again with the same `Idempotency-Key`, and with the id of the last event it has
(server-sent events' own `Last-Event-ID`); it gets what comes after that event. An id says for each choice how
many tokens stand behind the text so far: `12`; `12t` = all text is there; `12f` = so is the finish reason.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.sessions.session import Delta, Session
from stoker.errors import InvalidRequest
from stoker.ids import SessionId
from stoker.v1 import session_pb2

KEY_HEADER = "idempotency-key"
LAST_EVENT_HEADER = "last-event-id"
MAX_KEY_CHARACTERS = 255
_EVENT_ID = re.compile(r"(?P<tag>[0-9a-f]{8}):(?P<choices>\d{1,9}[tf]?(,\d{1,9}[tf]?){0,1023})")
_KEY = re.compile(r"[!-~]{1,255}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a client has of one choice."""

    tokens: int = 0
    """It has the text of so many."""
    has_end: bool = False
    """All of the text, also what only the answer's end gave out."""
    has_finish: bool = False
    """The finish reason, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestKey:
    """What an idempotency key makes of a request."""

    name: str
    """Of all its sessions; says nothing about the key or its owner."""
    fingerprint: bytes
    """Of the request's path and body."""
    seed: int
    """Where the client gives none; 64 bits."""
    revision_tag: str = ""
    """Of the weights that made what the client has; empty = it has nothing."""
    seen: tuple[Seen, ...] = ()
    """What the client has, choice by choice; empty = nothing."""

    def session_id(self, choice: int) -> SessionId:
        """Return the name of a choice's session, the same on every gateway."""
        return SessionId(f"{self.name}-{choice}")


def read_key(
    key: str | None, last_event_id: str | None, *, owner: str, path: str, body: bytes
) -> RequestKey | None:
    """Return a request's key; None = it has none.

    Args:
        key: The header `Idempotency-Key`.
        last_event_id: The header `Last-Event-ID`.
        owner: Whose key it is: the header `Authorization`, or empty.
        path: Of the request.
        body: Of the request.

    Raises:
        InvalidRequest: One of the headers is not what it should be.
    """
    if key is None:
        if last_event_id:
            raise InvalidRequest(
                "Last-Event-ID without Idempotency-Key: send the key that the stream began with",
                param=LAST_EVENT_HEADER,
            )
        return None
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            f"Idempotency-Key must be 1 to {MAX_KEY_CHARACTERS} visible ASCII characters", param=KEY_HEADER
        )
    named = hashlib.sha256(f"{owner}\0{key}".encode()).digest()
    tag, seen = _parse(last_event_id) if last_event_id else ("", ())
    return RequestKey(
        name="key-" + named[:16].hex(),
        fingerprint=hashlib.sha256(path.encode() + b"\0" + body).digest()[:16],
        seed=int.from_bytes(named[16:24], "big"),
        revision_tag=tag,
        seen=seen,
    )


def revision_tag(revision: str) -> str:
    """Return how event ids name the weights of a revision."""
    return hashlib.sha256(revision.encode()).hexdigest()[:8]


def event_ids(tag: str, seen: Sequence[Seen]) -> str:
    """Return the id of an event after which a client has this."""
    return tag + ":" + ",".join(_one(choice) for choice in seen)


def after_delta(messages: int, number: int, delta: Delta) -> Seen:
    """Return what a client has of a choice after one of the messages that a delta became.

    Args:
        messages: How many it became.
        number: Which of them, from 0.
        delta: The delta.
    """
    has_end = delta.finish_reason is not None
    return Seen(tokens=delta.received, has_end=has_end, has_finish=has_end and number == messages - 1)


def feed_unseen(session: Session, event: session_pb2.GenerateEvent, seen: Seen) -> Delta:
    """Feed a session with an event and return what it adds to what the client has."""
    if seen.has_end:
        delta = session.feed(event)
        finish_reason = None if seen.has_finish else delta.finish_reason
        return Delta(finish_reason=finish_reason, received=delta.received)
    known = min(seen.tokens - len(session.token_ids), len(event.tokens))
    if known <= 0:
        return session.feed(event)
    if known == len(event.tokens) and event.finish_reason == session_pb2.FINISH_REASON_STOP:
        delta = session.feed(event)  # a stop token: never split from its finish
        return Delta(finish_reason=delta.finish_reason, received=delta.received)
    head, rest = session_pb2.GenerateEvent(), session_pb2.GenerateEvent()
    head.CopyFrom(event)
    head.ClearField("finish_reason")
    del head.tokens[known:]
    rest.CopyFrom(event)
    del rest.tokens[:known]
    rest.position = event.position + known
    delta = session.feed(head)
    if delta.finish_reason is not None:  # a stop string ended with it
        return Delta(finish_reason=delta.finish_reason, received=delta.received)
    return session.feed(rest)


def _one(seen: Seen) -> str:
    return f"{seen.tokens}{'f' if seen.has_finish else 't' if seen.has_end else ''}"


def _parse(text: str) -> tuple[str, tuple[Seen, ...]]:
    match = _EVENT_ID.fullmatch(text[:16_384])
    if match is None:
        raise InvalidRequest(
            f"Last-Event-ID {text[:64]!r} is no id of an event of this API; send the last `id:` line you got",
            param=LAST_EVENT_HEADER,
        )
    return match["tag"], tuple(
        Seen(
            tokens=int(one.rstrip("tf")),
            has_end=one.endswith(("t", "f")),
            has_finish=one.endswith("f"),
        )
        for one in match["choices"].split(",")
    )
