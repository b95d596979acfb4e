"""Frames: what a stream of bytes is cut into."""

from __future__ import annotations

import pytest

from stoker.errors import PeerError
from stoker.frames import LENGTH_BYTES, MAX_FRAME_BYTES, FrameReader, framed

MESSAGES = [b"", b"one", b"x" * 300, b"last"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_messages_come_out_whole_however_their_bytes_come_in(size: int) -> None:
    stream = b"".join(framed(message) for message in MESSAGES)
    reader = FrameReader()

    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]

    assert [message for piece in pieces for message in reader.feed(piece)] == MESSAGES


def test_a_length_over_the_limit_is_refused_before_its_bytes_come() -> None:
    reader = FrameReader()

    with pytest.raises(PeerError, match="announced"):
        list(reader.feed((MAX_FRAME_BYTES + 1).to_bytes(LENGTH_BYTES, "little")))


def test_a_message_over_the_limit_is_not_sent() -> None:
    with pytest.raises(ValueError, match="at most"):
        framed(bytes(MAX_FRAME_BYTES + 1))
