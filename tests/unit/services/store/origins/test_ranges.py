"""Patience: what is tried again, after which pause, and when it is given up."""

from __future__ import annotations

import threading

import pytest

from services.store.origins.origin import Broken, RemoteFile
from services.store.origins.ranges import Ranges, Retry, pause_seconds
from stoker.errors import CheckpointInvalid, NotFound, PeerError

FILE = RemoteFile(name="f", size_bytes=10, version="")


class Origin:
    """Brings `pieces` bytes per attempt and breaks, until the range is full."""

    uri = "fake://folder"

    def __init__(self, *pieces: int | Exception) -> None:
        self.pieces = list(pieces)
        self.offsets: list[int] = []

    def find(self, names):
        """See `Origin`."""
        raise self.pieces.pop(0)

    def read_into(self, file, into, *, offset, told=None):
        """See `Origin`."""
        self.offsets.append(offset)
        piece = self.pieces.pop(0) if self.pieces else len(into)
        if isinstance(piece, Exception):
            raise piece
        into[:piece] = bytes(range(offset, offset + piece))
        if piece < len(into):
            raise Broken("broke", done_bytes=piece)

    def close(self):
        """See `Origin`."""


class Stopped(threading.Event):
    """Notes the pauses instead of making them."""

    def __init__(self, *, now: bool = False) -> None:
        super().__init__()
        self.pauses: list[float | None] = []
        self.now = now

    def wait(self, timeout: float | None = None) -> bool:
        """Note the pause."""
        self.pauses.append(timeout)
        return self.now


def ranges(origin: Origin, stopped: threading.Event | None = None) -> Ranges:
    return Ranges(origin, retry=Retry(attempts=3, first_seconds=1.0), stopped=stopped or Stopped())


def test_pauses_double_up_to_a_bound_and_are_jittered():
    retry = Retry(attempts=9, first_seconds=1.0, most_seconds=6.0)
    pauses = [pause_seconds(retry, failures=n, asked_seconds=None, dice=1.0) for n in range(1, 6)]

    assert pauses == [1.0, 2.0, 4.0, 6.0, 6.0]
    assert pause_seconds(retry, failures=2, asked_seconds=None, dice=0.0) == 1.0


def test_what_the_origin_asks_for_is_waited_or_given_up():
    retry = Retry(attempts=3, first_seconds=1.0, most_seconds=6.0)

    assert pause_seconds(retry, failures=1, asked_seconds=4.0, dice=1.0) == 5.0
    assert pause_seconds(retry, failures=1, asked_seconds=6.1, dice=0.0) is None
    assert pause_seconds(retry, failures=3, asked_seconds=None, dice=0.0) is None


def test_progress_starts_the_count_anew():
    origin = Origin(1, 0, 1, 0, 1, 0)
    into = bytearray(10)
    ranges(origin).read_into(FILE, memoryview(into), offset=0)

    assert into == bytes(range(10))
    assert origin.offsets == [0, 1, 1, 2, 2, 3, 3]


def test_attempts_without_progress_are_bounded():
    with pytest.raises(PeerError, match=r"broke .tried 3 times.* check that the store.s host reaches it"):
        ranges(Origin(0, 0, 0)).read_into(FILE, memoryview(bytearray(10)), offset=0)


def test_what_cannot_pass_is_not_tried_again():
    stopped = Stopped()
    with pytest.raises(NotFound):
        ranges(Origin(NotFound("gone")), stopped).find(["f"])

    assert stopped.pauses == []


def test_a_store_that_stops_does_not_wait():
    with pytest.raises(PeerError, match="being stopped"):
        ranges(Origin(Broken("x")), Stopped(now=True)).find(["f"])


def test_a_small_file_that_is_large_is_refused_before_it_is_read():
    origin = Origin()
    with pytest.raises(CheckpointInvalid, match="not what its name says"):
        ranges(origin).read_whole(FILE, limit_bytes=9)

    assert origin.offsets == []
