"""What goes over the wire comes back the same, and what is no message is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.peers.wire import (
    HEAD,
    MAX_BODY_BYTES,
    Arriving,
    Chunk,
    FileId,
    FileIdentity,
    Hello,
    Interest,
    Leave,
    Part,
    Ping,
    Purpose,
    Refused,
    Request,
    State,
    StoreId,
    Whole,
    body_length,
    decode,
    encode,
)
from stoker.errors import PeerError

FILE_ID = FileId(bytes(range(16)))
IDENTITY = FileIdentity(revision="r1", name="model.safetensors", size_bytes=100, chunk_bytes=32)
MESSAGES = [
    Hello(purpose=Purpose.CONTROL, store=StoreId("a1"), port=7073),
    Interest(file=IDENTITY, loading=True),
    Leave(file_id=FILE_ID),
    State(file_id=FILE_ID, loading=False, chunks=11, have=0b101, fetching=1 << 10),
    Ping(),
    Request(file_id=FILE_ID, index=3, want_digest=True),
    Chunk(length=32, digest=bytes(16)),
    Refused(reason="it is not here any more"),
    Arriving(length=2**24),
    Part(length=0),
    Whole(digest=b"\2" * 16),
]


def read(frame: bytes):
    """The message of a frame."""
    head, body = frame[: HEAD.size], frame[HEAD.size :]
    assert body_length(head) == len(body)
    return decode(head, body)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_as_it_was(message):
    assert read(encode(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_with_a_byte_more_or_less_is_refused(message):
    frame = encode(message)

    with pytest.raises(PeerError):
        decode(frame[: HEAD.size], frame[HEAD.size :] + b"\0")
    if len(frame) > HEAD.size:
        with pytest.raises(PeerError):
            decode(frame[: HEAD.size], frame[HEAD.size : -1])


@given(kind=st.integers(0, 255), body=st.binary(max_size=200))
def test_what_is_no_message_raises_a_peer_error_and_nothing_else(kind, body):
    head = HEAD.pack(kind, len(body))
    try:
        body_length(head)
        message = decode(head, body)
    except PeerError:
        return

    assert decode(head, encode(message)[HEAD.size :]) == message


def test_a_length_beyond_the_limit_is_refused_before_anything_is_allocated():
    with pytest.raises(PeerError):
        body_length(HEAD.pack(3, MAX_BODY_BYTES + 1))


def test_a_greeting_of_another_version_says_which():
    frame = bytearray(encode(MESSAGES[0]))
    frame[HEAD.size + 4] = 9

    with pytest.raises(PeerError, match="version 9"):
        read(bytes(frame))


def test_bits_past_the_end_of_the_file_are_refused():
    state = encode(State(file_id=FILE_ID, loading=True, chunks=16, have=1 << 15, fetching=0))
    frame = bytearray(state)
    frame[HEAD.size + 17] = 15  # says 15 chunks; the bitmaps stay two bytes long

    with pytest.raises(PeerError, match="past the end"):
        read(bytes(frame))


@pytest.mark.parametrize(
    "other",
    [
        FileIdentity(revision="r2", name="model.safetensors", size_bytes=100, chunk_bytes=32),
        FileIdentity(revision="r1", name="other.safetensors", size_bytes=100, chunk_bytes=32),
        FileIdentity(revision="r1", name="model.safetensors", size_bytes=101, chunk_bytes=32),
        FileIdentity(revision="r1", name="model.safetensors", size_bytes=100, chunk_bytes=64),
    ],
)
def test_files_that_differ_in_anything_have_different_names(other):
    assert other.file_id != IDENTITY.file_id


def test_the_last_chunk_is_as_long_as_what_is_left():
    assert IDENTITY.chunks == 4
    assert [IDENTITY.length(index) for index in range(4)] == [32, 32, 32, 4]
