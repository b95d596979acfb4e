"""Keys and values that leave a worker: whole, in order, and not while a step of its engine is late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from services.worker.kv.kv_desk import KvDesk
from services.worker.kv.kv_format import ALL_TOKENS, KvLayout, opened
from stoker.errors import KvUnavailable
from stoker.ids import SessionId
from stoker.v1.session_kv_pb2 import KvPart, ReadKvRequest

LAYOUT = KvLayout(
    revision="r", engine="e", cache=ALL_TOKENS, dtype="float32", layers=1, kv_heads=64, head_dim=1024
)
"""Two tokens fill a piece."""
TOKENS = (5, 6, 7, 8, 9)


class PlayedEngine:
    """An engine with one session, its thread, and the session's reader."""

    def __init__(self) -> None:
        self.engine, self.layout, self.numerics, self.adapter = self, LAYOUT, "n", ("", "")
        self.tokens: tuple[int, ...] = TOKENS
        self.is_late = self.is_stepping = False
        self.waits = 0
        self.moves_left = 0
        self.held_seconds = 0.0

    def export_kv(self, engine_id: SessionId) -> PlayedEngine:
        """Return the reader."""
        return self

    def hold(self, engine_id: SessionId, seconds: float) -> int:
        """Have the session stand still; it has a token more than can be read."""
        self.held_seconds = seconds
        return len(TOKENS) + 1

    def read(self, first: int, end: int) -> memoryview:
        """Return tokens' bytes, unless the store has moved."""
        if self.moves_left:
            self.moves_left -= 1
            raise KvUnavailable("moved")
        return memoryview(bytes((end - first) * LAYOUT.token_bytes))

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Do it at once, at the end of the step."""
        self.waits += self.is_late
        self.is_late = False
        done: Future[Any] = Future()
        done.set_result(work())
        return done


@pytest.fixture
def engine() -> PlayedEngine:
    return PlayedEngine()


@pytest.fixture
def desk(engine: PlayedEngine) -> Iterator[KvDesk]:
    desk = KvDesk(engine, share=1.0)  # type: ignore[arg-type]
    yield desk
    desk.close()


async def parts_of(desk: KvDesk, *, first: int = 0, within_seconds: float = 0.0) -> list[KvPart]:
    request = ReadKvRequest(session_id="s", from_token=first, within_seconds=within_seconds)
    return [KvPart.FromString(part) async for part in desk.read(request, SessionId("e"))]


async def test_a_header_is_followed_by_the_pieces_it_promises(desk: KvDesk) -> None:
    header, *pieces = await parts_of(desk, first=1)

    assert (header.header.from_token, header.header.to_token) == (1, len(TOKENS))
    at = 1
    for part in pieces:
        opened(part.piece, LAYOUT, at=at, end=len(TOKENS))
        at += len(part.piece.token_ids)
    assert [token for part in pieces for token in part.piece.token_ids] == list(TOKENS[1:])


async def test_a_store_that_moves_is_read_again_some_times(desk: KvDesk, engine: PlayedEngine) -> None:
    engine.moves_left = 2
    assert len(await parts_of(desk)) == 4

    engine.moves_left = 99
    with pytest.raises(KvUnavailable, match="moved"):
        await parts_of(desk)


async def test_what_is_more_than_there_is_can_not_be_read(desk: KvDesk) -> None:
    with pytest.raises(KvUnavailable, match="has keys and values of 5 tokens, not 6"):
        await parts_of(desk, first=6)


async def test_no_piece_is_begun_while_a_step_is_late(engine: PlayedEngine) -> None:
    desk = KvDesk(engine, share=0.9)  # type: ignore[arg-type]
    reading = desk.read(ReadKvRequest(session_id="s"), SessionId("e"))
    await anext(reading)
    await anext(reading)
    waits = engine.waits
    engine.is_late = True

    await anext(reading)

    assert engine.waits == waits + 1
    await reading.aclose()
    desk.close()


async def test_a_session_without_time_to_lose_waits_for_no_step(desk: KvDesk, engine: PlayedEngine) -> None:
    reading = desk.read(ReadKvRequest(session_id="s", within_seconds=1e-9), SessionId("e"))
    await anext(reading)
    engine.is_late = True

    await anext(reading)

    assert engine.waits == 0
    await reading.aclose()


async def test_a_session_that_shall_stand_still_does_so_where_the_read_ends(
    desk: KvDesk, engine: PlayedEngine
) -> None:
    request = ReadKvRequest(session_id="s", from_token=4, hold_seconds=0.5)
    reading = desk.read(request, SessionId("e"))

    header = KvPart.FromString(await anext(reading)).header
    engine.is_late = True
    pieces = [KvPart.FromString(part) async for part in reading]

    assert (header.to_token, header.held_tokens) == (len(TOKENS), len(TOKENS) + 1)
    assert engine.held_seconds == 0.5
    assert [token for part in pieces for token in part.piece.token_ids] == list(TOKENS[4:])
    assert engine.waits == 0


async def test_a_session_that_can_not_be_read_does_not_stand_still(engine: PlayedEngine) -> None:
    def refuse(engine_id: SessionId) -> PlayedEngine:
        raise KvUnavailable("it has none yet")

    engine.export_kv = refuse  # type: ignore[method-assign]
    desk = KvDesk(engine)  # type: ignore[arg-type]

    with pytest.raises(KvUnavailable, match="none yet"):
        await anext(desk.read(ReadKvRequest(session_id="s", hold_seconds=0.5), SessionId("e")))

    assert engine.held_seconds == 0.0
    desk.close()
