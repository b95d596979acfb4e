"""Ranges over real HTTP, with every way in which an origin fails."""

from __future__ import annotations

import os
import threading
from collections import deque

import pytest

from services.store.origins.http_origin import HttpOrigin
from services.store.origins.origin import Broken, OriginChanged, OriginRefused
from services.store.origins.ranges import Ranges, Retry
from stoker.errors import NotFound, PeerError
from tests.integration.store.origin_server import Fault, OriginServer, origin_server

NAME = "model.safetensors"
CONTENT = os.urandom(3_000_001)


@pytest.fixture
def server(tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT)
    with origin_server(tmp_path) as made:
        yield made


@pytest.fixture
def ranges(server):
    origin = HttpOrigin(server.url, timeout_seconds=5)
    yield Ranges(origin, retry=Retry(attempts=3, first_seconds=0.0), stopped=threading.Event())
    origin.close()


def read(ranges: Ranges, *, offset: int, length: int) -> bytes:
    (file,) = ranges.find([NAME]).values()
    into = bytearray(length)
    ranges.read_into(file, memoryview(into), offset=offset)
    return bytes(into)


def test_a_range_is_the_files_bytes(ranges: Ranges, server: OriginServer):
    assert read(ranges, offset=1_000_003, length=1_500_000) == CONTENT[1_000_003:2_500_003]
    assert ranges.find([NAME, "absent"])[NAME].size_bytes == len(CONTENT)
    assert server.sent[NAME] == 1_500_000


def test_a_connection_that_breaks_is_resumed_where_it_stopped(ranges: Ranges, server: OriginServer):
    server.faults[NAME] = deque([Fault(cut_after=1_200_000), Fault(cut_after=0), Fault(cut_after=300_000)])

    assert read(ranges, offset=10, length=2_000_000) == CONTENT[10:2_000_010]
    assert server.sent[NAME] == 2_000_000
    assert [begin for begin, _ in server.gets[NAME]] == [10, 1_200_010, 1_200_010, 1_500_010]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again_a_bounded_number_of_times(
    ranges: Ranges, server: OriginServer, status: int
):
    server.faults[NAME] = deque([Fault(status=status, retry_after="0")])

    assert read(ranges, offset=0, length=100) == CONTENT[:100]
    server.always[NAME] = Fault(status=status)
    with pytest.raises(PeerError, match=f"answers {status}.*3 times"):
        read(ranges, offset=0, length=100)


def test_an_origin_that_asks_for_too_long_a_pause_is_given_up(ranges: Ranges, server: OriginServer):
    server.always[NAME] = Fault(status=429, retry_after="3600")

    with pytest.raises(PeerError) as caught:
        read(ranges, offset=0, length=100)

    assert caught.value.retry_after_seconds == 3600
    assert len(server.gets[NAME]) == 1


def test_a_refusal_is_final(ranges: Ranges, server: OriginServer):
    server.always[NAME] = Fault(status=403)

    with pytest.raises(OriginRefused, match=r"answers 403.*credentials"):
        read(ranges, offset=0, length=100)
    assert len(server.gets[NAME]) == 1


def test_a_file_that_vanished_is_not_found(ranges: Ranges, server: OriginServer):
    server.always[NAME] = Fault(status=404)

    with pytest.raises(NotFound, match="no such file"):
        read(ranges, offset=0, length=100)


def test_an_origin_that_ignores_range_is_told_apart(ranges: Ranges, server: OriginServer):
    server.always[NAME] = Fault(whole=True)

    with pytest.raises(OriginRefused, match="ignores Range"):
        read(ranges, offset=5, length=100)
    assert read(ranges, offset=0, length=len(CONTENT)) == CONTENT  # all of it was wanted


@pytest.mark.parametrize("tags", [True, False])
def test_a_file_that_was_changed_is_never_mixed_with_the_old_one(
    ranges: Ranges, server: OriginServer, *, tags: bool
):
    server.tags = tags
    (file,) = ranges.find([NAME]).values()
    (server.folder / NAME).write_bytes(CONTENT[:-1])

    with pytest.raises(OriginChanged, match="was changed"):
        ranges.read_into(file, memoryview(bytearray(100)), offset=0)


def test_an_origin_that_is_not_there_is_broken(tmp_path):
    origin = HttpOrigin("http://127.0.0.1:9/folder", timeout_seconds=1)

    with pytest.raises(Broken, match="ConnectionRefused"):
        origin.find([NAME])
