"""Sessions that outlive their reader: found with their tokens, taken over, released, and bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

import pytest

from services.node_agent.sessions.kept_sessions import KeepLimits, KeptSessions
from services.node_agent.sessions.relay import RelayedSession
from stoker.errors import Fenced, WorkerDied
from stoker.v1.session_pb2 import FINISH_REASON_LENGTH, GenerateEvent, GenerateRequest, Token, TopLogprob


class Desk:
    """Kept sessions over relayed ones that the test feeds."""

    def __init__(self, **limits: float) -> None:
        self.open: dict[str, RelayedSession] = {}
        self.closed: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.kept = KeptSessions(self.session, self.spawn, KeepLimits(**limits))  # type: ignore[arg-type]

    def spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        """Run a task."""
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    @asynccontextmanager
    async def session(self, request: GenerateRequest) -> AsyncIterator[RelayedSession]:
        """Open a session."""
        name = f"{request.session_id}/{request.epoch}"
        self.open[name] = RelayedSession(request.session_id, request.epoch)
        try:
            yield self.open[name]
        finally:
            del self.open[name]
            self.closed.append(name)

    async def feed(self, name: str, *ids: int, at: int = 0, last: bool = False) -> None:
        """Let a session make tokens."""
        await settle()
        tokens = [Token(id=number, logprob=-number) for number in ids]
        event = GenerateEvent(position=at, tokens=tokens)
        if last:
            event.finish_reason = FINISH_REASON_LENGTH
        self.open[name].put(event)
        await settle()

    def found(self, session_id: str = "s") -> list[int]:
        """Return the tokens that are found of a session."""
        (kept,) = self.kept.find([session_id], lambda _: -1)
        return [token.id for token in kept.tokens]


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


def order(session_id: str = "s", epoch: int = 0, generated: tuple[int, ...] = ()) -> GenerateRequest:
    return GenerateRequest(
        session_id=session_id,
        epoch=epoch,
        replica_id="rep-1",
        generated_token_ids=generated,
        keep_seconds=60,
        fingerprint=b"f",
    )


async def read(desk: Desk, request: GenerateRequest) -> asyncio.Task[list[int]]:
    async def follow() -> list[int]:
        seen = []
        async for event in desk.kept.generate(request, "r1"):
            seen += [token.id for token in event.tokens]
        return seen

    reader = asyncio.create_task(follow())
    await settle()
    return reader


async def leave(reader: asyncio.Task[list[int]]) -> None:
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)


async def test_a_session_goes_on_and_keeps_its_tokens_when_its_reader_has_gone() -> None:
    desk = Desk()
    reader = await read(desk, order())
    await desk.feed("s/0", 1, 2)

    await leave(reader)
    await desk.feed("s/0", 3, at=2, last=True)

    (kept,) = desk.kept.find(["s", "unknown"], lambda _: -1)
    assert [(token.id, token.logprob) for token in kept.tokens] == [(1, -1), (2, -2), (3, -3)]
    assert (kept.epoch, kept.replica_id, kept.revision, kept.fingerprint) == (0, "rep-1", "r1", b"f")
    assert (kept.scored_from, kept.finish_reason) == (0, FINISH_REASON_LENGTH)


async def test_a_reader_that_stays_gets_everything_to_the_end() -> None:
    desk = Desk()
    reader = await read(desk, order())

    await desk.feed("s/0", 1)
    await desk.feed("s/0", 2, at=1, last=True)

    assert await reader == [1, 2]


async def test_a_session_that_nobody_comes_back_for_is_ended_and_forgotten() -> None:
    desk = Desk(keep_seconds=0.0)
    reader = await read(desk, order())
    await desk.feed("s/0", 1)

    await leave(reader)
    await asyncio.gather(*desk.tasks)

    assert desk.closed == ["s/0"]
    assert desk.kept.find(["s"], lambda _: -1) == []


async def test_whoever_takes_a_session_over_finds_the_scores_of_earlier_tokens() -> None:
    desk = Desk()
    await leave(await _begun(desk))

    reader = await read(desk, order(epoch=1, generated=(1, 2)))
    await desk.feed("s/1", 3, at=2)
    (kept,) = desk.kept.find(["s"], lambda _: -1)

    assert [token.logprob for token in kept.tokens] == [-1, -2, -3]
    assert (kept.epoch, kept.scored_from) == (1, 0)
    await leave(reader)


async def _begun(desk: Desk) -> asyncio.Task[list[int]]:
    reader = await read(desk, order())
    await desk.feed("s/0", 1, 2)
    return reader


async def test_tokens_made_elsewhere_have_no_scores_and_it_says_so() -> None:
    desk = Desk()
    reader = await read(desk, order(epoch=4, generated=(7, 8)))
    await desk.feed("s/4", 9, at=2)

    (kept,) = desk.kept.find(["s"], lambda _: -1)
    assert ([token.id for token in kept.tokens], kept.scored_from) == ([7, 8, 9], 2)
    await leave(reader)


async def test_a_released_session_ends_and_its_tokens_stay() -> None:
    desk = Desk()
    await leave(await _begun(desk))

    desk.kept.release("s", epoch=0)
    await settle()

    assert desk.closed == ["s/0"]
    assert desk.found() == [1, 2]


async def test_a_late_release_does_not_end_the_next_owners_session() -> None:
    desk = Desk()
    reader = await read(desk, order(epoch=3))

    desk.kept.release("s", epoch=2)
    await settle()

    assert desk.closed == []
    await leave(reader)


async def test_a_session_that_moved_within_the_node_ends_where_it_came_from() -> None:
    """Its destination's log is the one that is found by then."""
    desk = Desk()
    source = await _begun(desk)
    destination = await read(desk, order(epoch=1, generated=(1, 2)))

    await leave(source)
    desk.kept.release("s", epoch=0)
    await settle()

    assert desk.closed == ["s/0"]
    await desk.feed("s/1", 3, at=2, last=True)
    assert await destination == [3]
    desk.kept.release("s", epoch=1)  # of a run that is over: nothing is left to end


async def test_the_reader_hears_how_its_session_failed() -> None:
    desk = Desk()
    reader = await _begun(desk)

    desk.open["s/0"].fail(WorkerDied("gone"))

    with pytest.raises(WorkerDied):
        await reader
    assert desk.found() == [1, 2]


async def test_an_owner_that_was_taken_over_hears_that_it_is_fenced() -> None:
    desk = Desk()
    reader = await _begun(desk)

    desk.open["s/0"].fail(Fenced("taken over"))

    with pytest.raises(Fenced):
        await reader


async def test_the_oldest_without_a_reader_goes_first_when_there_are_too_many() -> None:
    desk = Desk(sessions=2)
    first = await read(desk, order("a"))
    await leave(await read(desk, order("b")))

    third = await read(desk, order("c"))
    await settle()

    assert [len(desk.kept.find([name], lambda _: -1)) for name in "abc"] == [1, 0, 1]
    assert desk.closed == ["b/0"]
    for reader in (first, third):
        await leave(reader)


async def test_alternatives_count_like_tokens_towards_what_is_kept() -> None:
    desk = Desk(tokens=10)
    await leave(await _begun(desk))
    reader = await read(desk, order("b"))
    wide = Token(id=1, top_logprobs=[TopLogprob(id=number) for number in range(10)])

    desk.open["b/0"].put(GenerateEvent(tokens=[wide]))
    await settle()

    assert desk.kept.find(["s"], lambda _: -1) == []
    assert desk.found("b") == [1]
    await leave(reader)


async def test_a_session_that_is_only_remembered_by_its_epoch_is_found_by_it() -> None:
    (kept,) = Desk().kept.find(["s"], lambda _: 5)

    assert (kept.epoch, len(kept.tokens)) == (5, 0)
