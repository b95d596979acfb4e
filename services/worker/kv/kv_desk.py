"""Where keys and values of sessions leave a worker and arrive there: streams of parts, beside the engine.

What has arrived waits, for some seconds, until its session comes (`claim`); otherwise its room goes back.
Room is counted in the engine's own budget, parts are written one at a time: memory is bounded by what the
cache has and one piece per stream. Belongs to the event loop; bytes are copied and digested in other threads,
which give way to those that make tokens.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVar

from services.worker.kv.kv_format import KvLayout, encoded, opened
from services.worker.kv.kv_pace import SHARE, Departure, KvPace
from stoker import log
from stoker.errors import CapacityError, KvDamaged, KvUnavailable
from stoker.v1.session_kv_pb2 import KvHeader, KvPart, KvPiece, ReadKvRequest, WriteKvResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.worker.engine.engine_thread import EngineThread
    from services.worker.engine.protocol import Submit
    from services.worker.kv.kv_exchange import KvReader, StagedKv
    from stoker.ids import SessionId

T = TypeVar("T")

KEPT_SECONDS = 15.0
"""How long what arrived waits for its session, or for more of it: the next round comes at once."""
MAX_STAGED = 32
"""Sessions on their way here at once."""
NICENESS = 5
"""Of the threads that copy: a third of the weight of one that makes tokens. One that is set aside while it
holds the interpreter's lock stops the engine, so they are not the very last."""
MAX_MOVED_READS = 4
"""Times a session's store may move (as it grows) while it is read by one call."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Arriving:
    """Keys and values of one session."""

    staged: StagedKv
    adapter: tuple[str, str]
    token_ids: list[int] = field(default_factory=list)
    is_busy: bool = False
    """A call writes to it."""
    timer: asyncio.TimerHandle | None = None


class KvDesk:
    """Keys and values in and out of one engine.

    Args:
        engine: The engine.
        kept_seconds: See `KEPT_SECONDS`.
        share: Of the time, in which sessions that go on may be read (`KvPace`).
    """

    def __init__(
        self, engine: EngineThread, kept_seconds: float = KEPT_SECONDS, *, share: float = SHARE
    ) -> None:
        self._pace = KvPace(share)
        self._engine = engine
        self._kept_seconds = kept_seconds
        self._arriving: dict[str, _Arriving] = {}
        self._thread = ThreadPoolExecutor(2, "stoker-kv", initializer=_give_way)

    # --- out ---

    async def read(self, request: ReadKvRequest, engine_id: SessionId) -> AsyncGenerator[bytes]:
        """Yield the parts of a session that runs in the engine, as it is now: `KvPart`s in their wire form.

        With `hold_seconds` it stands still from then on, and nothing else is waited for.

        Raises:
            NotFound: It has ended.
            KvUnavailable: Its keys and values can't be shipped, for a reason.
        """
        reader, held_tokens = await self._export(engine_id, request.hold_seconds)
        layout, first, end = reader.layout, request.from_token, len(reader.tokens)
        if first > end:
            raise KvUnavailable(
                f"session {request.session_id} has keys and values of {end} tokens, not {first}"
            )
        adapter_uri, adapter_revision = reader.adapter
        header = KvHeader(
            session_id=request.session_id,
            layout=layout.to_proto(),
            numerics=self._engine.engine.numerics,
            from_token=first,
            to_token=end,
            adapter_uri=adapter_uri,
            adapter_revision=adapter_revision,
            held_tokens=held_tokens,
        )
        yield KvPart(header=header).SerializeToString()
        pieces = list(layout.pieces(first, end))
        hurry_seconds = request.within_seconds or float("inf")
        departure = self._pace.begin(len(pieces), time.monotonic() + hurry_seconds)
        moved = 0
        try:
            for start, stop in pieces:
                if not held_tokens:
                    await self._until_on_time()
                began_seconds = time.monotonic()
                while True:
                    try:
                        piece = await self._in_thread(partial(_encoded, reader, start, stop))
                        break
                    except KvUnavailable:
                        moved += 1
                        if moved > MAX_MOVED_READS:
                            raise
                        reader, _ = await self._export(engine_id)
                        if len(reader.tokens) < end:  # set back: it computes them again
                            raise
                yield piece  # comes back when the wire has taken it
                if stop < end and not held_tokens:
                    await asyncio.sleep(self._rest_seconds(departure, began_seconds))
        finally:
            self._pace.end(departure)

    async def _until_on_time(self) -> None:
        """Wait for the end of a step that is late already, unless there is no time to lose."""
        if self._engine.is_late and self._pace.share(time.monotonic()) < 1:
            await asyncio.wrap_future(self._engine.call(lambda: None))

    def _rest_seconds(self, departure: Departure, began_seconds: float) -> float:
        now_seconds = time.monotonic()
        rest_seconds = self._pace.rest_seconds(departure, now_seconds - began_seconds, now_seconds)
        return rest_seconds if self._engine.is_stepping else 0.0  # else nobody waits for a token

    async def _export(self, engine_id: SessionId, hold_seconds: float = 0.0) -> tuple[KvReader, int]:
        """Return what reads a session, and how many tokens it has if it stands still from now on, else 0."""

        def between_steps() -> tuple[KvReader, int]:
            engine = self._engine.engine
            reader = engine.export_kv(engine_id)
            return reader, engine.hold(engine_id, hold_seconds) if hold_seconds else 0

        return await asyncio.wrap_future(self._engine.call(between_steps))

    # --- in ---

    async def write(self, parts: AsyncIterator[KvPart]) -> WriteKvResponse:
        """Take a session's parts; return when all of them are in the cache.

        Raises:
            KvUnavailable: They don't fit this engine, or what is here of them; what was here is gone.
            CapacityError: There is no room in the cache, or too many sessions are on their way.
        """
        header = await _next(parts, "header")
        arriving = await self._begin(header.header)
        try:
            await self._fill(arriving, header.header, parts)
        except BaseException as error:
            self._drop(header.header.session_id, arriving)
            log.get().warning("kv.refused", session_id=header.header.session_id, message=str(error))
            raise
        finally:
            arriving.is_busy = False
        self._wait_for_session(header.header.session_id, arriving)
        tokens = arriving.staged.tokens
        data_bytes = (tokens - header.header.from_token) * arriving.staged.layout.token_bytes
        return WriteKvResponse(tokens=tokens, data_bytes=data_bytes, held_tokens=header.header.held_tokens)

    async def _begin(self, header: KvHeader) -> _Arriving:
        layout = self._engine.engine.kv_layout
        layout.check_sendable()
        layout.check_equal(KvLayout.from_proto(header.layout))
        if header.from_token > header.to_token:
            raise KvDamaged(
                f"keys and values from token {header.from_token} to {header.to_token} were announced"
            )
        arriving = self._arriving.get(header.session_id)
        if arriving is not None and arriving.is_busy:
            raise KvUnavailable(f"keys and values of session {header.session_id} are arriving already")
        if arriving is not None and header.from_token == 0:
            self._drop(header.session_id, arriving)
            arriving = None
        if arriving is None and header.from_token > 0:
            raise KvUnavailable(f"what was here of session {header.session_id} is gone")
        if arriving is None:
            if len(self._arriving) >= MAX_STAGED:
                raise CapacityError(f"{MAX_STAGED} sessions are moving here already", retry_after_seconds=1.0)
            adapter = header.adapter_uri, header.adapter_revision
            arriving = _Arriving(staged=self._engine.engine.stage_kv(), adapter=adapter)
            self._arriving[header.session_id] = arriving
        elif arriving.staged.tokens != header.from_token:
            self._drop(header.session_id, arriving)
            raise KvUnavailable(
                f"{arriving.staged.tokens} tokens of session {header.session_id} are here, "
                f"more came from {header.from_token} on"
            )
        arriving.is_busy = True
        if arriving.timer is not None:
            arriving.timer.cancel()
        return arriving

    async def _fill(self, arriving: _Arriving, header: KvHeader, parts: AsyncIterator[KvPart]) -> None:
        staged = arriving.staged
        if not staged.has_room(header.to_token):  # the last tokens find room: they wait for no step here
            await self._in_engine(self._engine.engine.warm_decode)  # while the source decodes
            await self._in_engine(lambda: staged.extend(header.to_token))
        while staged.tokens < header.to_token:
            piece = (await _next(parts, "piece")).piece
            await self._in_thread(partial(_write, staged, piece, header.to_token))
            arriving.token_ids += piece.token_ids

    def claim(self, session_id: str, wanted: Submit) -> StagedKv | None:
        """Return what has arrived of a session, as far as it is of these tokens; None = nothing.

        It is the caller's from now on: it goes to the engine, or back through `release`.
        """
        arriving = self._arriving.get(session_id)
        if arriving is None or arriving.is_busy:
            return None
        self._forget(session_id, arriving)
        adapter = ("", "") if wanted.adapter is None else wanted.adapter.identity
        common = _common((*wanted.prompt_token_ids, *wanted.generated_token_ids), arriving.token_ids)
        if adapter != arriving.adapter or not common:
            log.get().warning("kv.useless", session_id=session_id, tokens=arriving.staged.tokens)
            self.release(arriving.staged)
            return None
        arriving.staged.tokens = common
        return arriving.staged

    def release(self, staged: StagedKv) -> None:
        """Give room back that no session got."""
        self._engine.call(staged.release)

    def close(self) -> None:
        """Forget everything: the engine is about to end."""
        for session_id, arriving in list(self._arriving.items()):
            self._forget(session_id, arriving)
        self._thread.shutdown(wait=False)

    def _wait_for_session(self, session_id: str, arriving: _Arriving) -> None:
        loop = asyncio.get_running_loop()
        arriving.timer = loop.call_later(self._kept_seconds, self._drop, session_id, arriving)

    def _drop(self, session_id: str, arriving: _Arriving) -> None:
        self._forget(session_id, arriving)
        self.release(arriving.staged)

    def _forget(self, session_id: str, arriving: _Arriving) -> None:
        if arriving.timer is not None:
            arriving.timer.cancel()
        if self._arriving.get(session_id) is arriving:
            del self._arriving[session_id]

    # --- threads ---

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; a caller that is cancelled leaves no work behind."""
        return await finished(asyncio.get_running_loop().run_in_executor(self._thread, work))

    async def _in_engine(self, work: Callable[[], T]) -> T:
        return await finished(asyncio.wrap_future(self._engine.call(work)))


async def finished(running: asyncio.Future[T]) -> T:
    """Return a thread's result; a caller that is cancelled, however often, leaves when it is there."""
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():  # it writes where somebody else may write next
            with suppress(asyncio.CancelledError):  # again: the one that is raised below stands for all
                await asyncio.wait({running})
        raise


async def _next(parts: AsyncIterator[KvPart], kind: str) -> KvPart:
    part = await anext(parts, None)
    if part is None or part.WhichOneof("part") != kind:
        came = "nothing" if part is None else str(part.WhichOneof("part"))
        raise KvDamaged(f"keys and values broke off: a {kind} was due, {came} came")
    return part


def _give_way() -> None:
    """Lower this thread's priority, unless the whole process's is as low already."""
    thread = threading.get_native_id()
    if os.getpriority(os.PRIO_PROCESS, thread) < NICENESS:
        os.setpriority(os.PRIO_PROCESS, thread, NICENESS)


def _encoded(reader: KvReader, first: int, end: int) -> bytes:
    return encoded(first, reader.tokens[first:end], reader.read(first, end))


def _write(staged: StagedKv, piece: KvPiece, end: int) -> None:
    data = opened(piece, staged.layout, at=staged.tokens, end=end)
    staged.write(data, len(piece.token_ids))


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    pairs = zip(ours, theirs, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
