"""Keys and values that arrive at a worker: kept for their session, and for nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from services.worker.engine.protocol import Submit
from services.worker.kv.kv_desk import MAX_STAGED, KvDesk, finished
from services.worker.kv.kv_format import ALL_TOKENS, KvLayout, sealed
from stoker.errors import CapacityError, KvDamaged, KvUnavailable
from stoker.ids import SessionId
from stoker.v1.session_kv_pb2 import KvHeader, KvPart

LAYOUT = KvLayout(
    revision="r", engine="e", cache=ALL_TOKENS, dtype="float32", layers=1, kv_heads=1, head_dim=2
)
TOKENS = (5, 6, 7, 8)


class PlayedStaged:
    """Room in a cache."""

    def __init__(self) -> None:
        self.layout, self.tokens, self.room, self.released = LAYOUT, 0, 0, 0

    def has_room(self, tokens: int) -> bool:
        """Say whether there is room."""
        return tokens <= self.room

    def extend(self, tokens: int) -> None:
        """Make room."""
        if tokens > 100:
            raise CapacityError("no room")
        self.room = tokens

    def write(self, data: bytes, tokens: int) -> None:
        """Take a piece."""
        self.tokens += tokens

    def release(self) -> None:
        """Give it back."""
        self.released += 1


class PlayedEngine:
    """An engine and its thread."""

    def __init__(self) -> None:
        self.engine, self.kv_layout, self.numerics = self, LAYOUT, "n"
        self.staged: list[PlayedStaged] = []
        self.warmed = 0
        self.calls = 0

    def warm_decode(self) -> None:
        """Be warm."""
        self.warmed += 1

    def stage_kv(self) -> PlayedStaged:
        """Make room."""
        self.staged.append(PlayedStaged())
        return self.staged[-1]

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Do it at once."""
        self.calls += 1
        done: Future[Any] = Future()
        try:
            done.set_result(work())
        except CapacityError as error:
            done.set_exception(error)
        return done


@pytest.fixture
def engine() -> PlayedEngine:
    return PlayedEngine()


@pytest.fixture
def desk(engine: PlayedEngine) -> Iterator[KvDesk]:
    desk = KvDesk(engine)  # type: ignore[arg-type]
    yield desk
    desk.close()


def header(session: str = "s", *, first: int = 0, end: int = len(TOKENS), **layout: Any) -> KvPart:
    return KvPart(
        header=KvHeader(
            session_id=session, layout=replace(LAYOUT, **layout).to_proto(), from_token=first, to_token=end
        )
    )


def piece(first: int, tokens: Sequence[int]) -> KvPart:
    return KvPart(piece=sealed(first, tokens, bytes(len(tokens) * LAYOUT.token_bytes)))


async def stream(*parts: KvPart) -> AsyncIterator[KvPart]:
    for part in parts:
        yield part


def wanted(tokens: Sequence[int] = TOKENS) -> Submit:
    return Submit(session_id=SessionId("e"), prompt_token_ids=tokens)


async def test_rounds_add_up_and_go_to_the_session_they_belong_to(desk: KvDesk, engine: PlayedEngine) -> None:
    first = await desk.write(stream(header(end=3), piece(0, TOKENS[:2]), piece(2, TOKENS[2:3])))
    second = await desk.write(stream(header(first=3), piece(3, TOKENS[3:])))

    claimed = desk.claim("s", wanted())

    assert engine.warmed
    assert (first.tokens, second.tokens) == (3, 4)
    assert second.data_bytes == LAYOUT.token_bytes
    assert claimed is engine.staged[0]
    assert desk.claim("s", wanted()) is None
    assert engine.staged[0].released == 0


async def test_the_last_tokens_wait_for_no_step_where_there_is_room(
    desk: KvDesk, engine: PlayedEngine
) -> None:
    await desk.write(stream(header(end=2), piece(0, TOKENS[:2])))
    engine.staged[0].room = 128
    calls = engine.calls

    written = await desk.write(stream(header(first=2), piece(2, TOKENS[2:])))

    assert written.tokens == len(TOKENS)
    assert engine.calls == calls


async def test_a_session_uses_only_what_was_computed_for_its_own_tokens(
    desk: KvDesk, engine: PlayedEngine
) -> None:
    await desk.write(stream(header(), piece(0, TOKENS)))
    claimed = desk.claim("s", wanted((5, 6, 9)))
    assert claimed is not None
    assert claimed.tokens == 2

    await desk.write(stream(header(), piece(0, TOKENS)))
    assert desk.claim("s", wanted((9, 9))) is None
    assert engine.staged[1].released == 1


async def test_another_model_is_refused_before_a_piece_is_taken(desk: KvDesk, engine: PlayedEngine) -> None:
    with pytest.raises(KvUnavailable, match="head_dim is 4 there"):
        await desk.write(stream(header(head_dim=4), piece(0, TOKENS)))

    assert engine.staged == []


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (piece(0, TOKENS),),
        (header(),),
        (header(), header()),
        (header(), piece(1, TOKENS[1:])),
        (header(), piece(0, TOKENS[:2]), piece(0, TOKENS[:2])),
        (header(end=2), piece(0, TOKENS)),
        (header(first=4, end=2),),
    ],
)
async def test_what_breaks_off_or_is_out_of_order_leaves_nothing(
    desk: KvDesk, engine: PlayedEngine, parts: tuple[KvPart, ...]
) -> None:
    with pytest.raises(KvDamaged):
        await desk.write(stream(*parts))

    assert desk.claim("s", wanted()) is None
    assert all(staged.released == 1 for staged in engine.staged)


async def test_a_round_that_does_not_follow_what_is_here_is_refused(
    desk: KvDesk, engine: PlayedEngine
) -> None:
    with pytest.raises(KvUnavailable, match="gone"):
        await desk.write(stream(header(first=2), piece(2, TOKENS[2:])))
    await desk.write(stream(header(), piece(0, TOKENS)))

    with pytest.raises(KvUnavailable, match="4 tokens of session s are here"):
        await desk.write(stream(header(first=2), piece(2, TOKENS[2:])))

    assert engine.staged[0].released == 1


async def test_a_new_first_round_replaces_what_came_before(desk: KvDesk, engine: PlayedEngine) -> None:
    await desk.write(stream(header(), piece(0, TOKENS)))
    await desk.write(stream(header(), piece(0, TOKENS)))

    assert [staged.released for staged in engine.staged] == [1, 0]
    assert desk.claim("s", wanted()) is engine.staged[1]


async def test_no_room_and_too_many_are_refused(desk: KvDesk, engine: PlayedEngine) -> None:
    with pytest.raises(CapacityError, match="no room"):
        await desk.write(stream(header(end=101)))
    for number in range(MAX_STAGED):
        await desk.write(stream(header(str(number), end=0)))

    with pytest.raises(CapacityError, match="moving here already"):
        await desk.write(stream(header("one more", end=0)))

    assert engine.staged[0].released == 1


async def test_a_sender_that_leaves_gives_the_room_back(desk: KvDesk, engine: PlayedEngine) -> None:
    began = asyncio.Event()

    async def stuck() -> AsyncIterator[KvPart]:
        yield header()
        yield piece(0, TOKENS[:2])
        began.set()
        await asyncio.Event().wait()

    writing = asyncio.create_task(desk.write(stuck()))
    await began.wait()
    with pytest.raises(KvUnavailable, match="arriving already"):
        await desk.write(stream(header(), piece(0, TOKENS)))
    assert desk.claim("s", wanted()) is None

    writing.cancel()
    await asyncio.wait({writing})

    assert engine.staged[0].released == 1


async def test_what_nobody_comes_for_is_given_back(engine: PlayedEngine) -> None:
    desk = KvDesk(engine, kept_seconds=0.0)  # type: ignore[arg-type]
    await desk.write(stream(header(), piece(0, TOKENS)))
    while not engine.staged[0].released:  # noqa: ASYNC110 - a timer of the loop does it
        await asyncio.sleep(0)

    assert desk.claim("s", wanted()) is None
    desk.close()


async def test_a_write_that_is_under_way_is_waited_for_however_often_its_caller_is_cancelled() -> None:
    """What it writes to may belong to another session as soon as the caller is gone."""
    writing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    caller = asyncio.ensure_future(finished(writing))
    for _ in range(3):
        await asyncio.sleep(0)
        caller.cancel()
    await asyncio.sleep(0)
    waited = not caller.done()
    writing.set_result(None)

    with pytest.raises(asyncio.CancelledError):
        await caller
    assert waited
