"""Sessions that outlive their reader: their tokens are kept, and they go on for a while without a gateway.

A gateway asks for it (`keep_seconds`) when its client may come back through another gateway. The session is
then read by a task of its own, which keeps the tokens; the `Generate` call follows that task and may leave.
A gateway that finds the session here (`find`) goes on with an ordinary `Generate` of a higher epoch, which
takes the session over as any move does.

Everything is bounded: the time after the reader has left, the sessions, and the tokens kept of all together.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from services.node_agent.sessions.relay import MAX_BUFFERED_EVENTS, RelayedSession
from stoker.errors import CapacityError, ReplicaGone, StokerError
from stoker.v1.node_agent_pb2 import KeptSession
from stoker.v1.session_pb2 import FinishReason, GenerateEvent, GenerateRequest, Token

MAX_ASKED_SESSIONS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepLimits:
    """What may be kept."""

    keep_seconds: float = 120.0
    """After the reader has left, whatever the gateway asks for."""
    sessions: int = 4096
    tokens: int = 1_000_000
    """Of all sessions; a likely alternative counts like a token. About 100 MB."""


class _Kept:
    """One session: what it has given, and its reader."""

    def __init__(self, request: GenerateRequest, revision: str) -> None:
        self.request = request
        self.revision = revision
        self.tokens = [Token(id=token) for token in request.generated_token_ids]
        self.scored_from = len(self.tokens)
        self.finish_reason = FinishReason.FINISH_REASON_UNSPECIFIED
        self.weight = len(self.tokens)
        self.has_reader = True
        self.task: asyncio.Task[None] | None = None
        self._events: deque[GenerateEvent] = deque()
        self._error: StokerError | None = None
        self._news = asyncio.Event()

    def inherit(self, earlier: _Kept) -> None:
        """Take over the log probabilities of tokens that both have."""
        count = len(self.tokens)
        if [token.id for token in earlier.tokens[:count]] == [token.id for token in self.tokens]:
            self.tokens = earlier.tokens[:count]
            self.scored_from = min(earlier.scored_from, count)
            self.weight = sum(map(_weight, self.tokens))

    def take(self, event: GenerateEvent) -> None:
        """Keep an event's tokens, and the event for the reader."""
        self.tokens.extend(event.tokens)
        self.weight += sum(map(_weight, event.tokens))
        self.finish_reason = event.finish_reason or self.finish_reason
        if not self.has_reader:
            return
        if len(self._events) >= MAX_BUFFERED_EVENTS:
            self._events.clear()
            self.fail(CapacityError(f"the reader of this session lags {MAX_BUFFERED_EVENTS} events behind"))
            return
        self._events.append(event)
        self._news.set()

    def fail(self, error: StokerError) -> None:
        """Tell the reader how it ended."""
        self._error = self._error or error
        self._news.set()

    async def next(self) -> GenerateEvent:
        """Return the next event; raises what the session ended with."""
        while not self._events:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()

    def described(self) -> KeptSession:
        return KeptSession(
            session_id=self.request.session_id,
            epoch=self.request.epoch,
            replica_id=self.request.replica_id,
            revision=self.revision,
            fingerprint=self.request.fingerprint,
            tokens=self.tokens,
            scored_from=self.scored_from,
            finish_reason=self.finish_reason,
        )


class KeptSessions:
    """The sessions of this node that outlive their reader.

    Args:
        open_session: Runs a session on a replica of this node, as `Host.session`.
        spawn: Starts a task that the agent ends with itself.
        limits: What may be kept.
    """

    def __init__(
        self,
        open_session: Callable[[GenerateRequest], AbstractAsyncContextManager[RelayedSession]],
        spawn: Callable[[Coroutine[None, None, None], str], asyncio.Task[None]],
        limits: KeepLimits,
    ) -> None:
        self._open_session = open_session
        self._spawn = spawn
        self._limits = limits
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._running: dict[tuple[str, int], _Kept] = {}
        """By session and epoch: those of a mover and of its source are two."""
        self._weight = 0

    async def generate(self, request: GenerateRequest, revision: str) -> AsyncGenerator[GenerateEvent]:
        """Yield a session's events; leaving early lets it go on for a while.

        Args:
            request: With `keep_seconds`.
            revision: Of the checkpoint of its replica.

        Raises:
            StokerError: As the session's own.
        """
        kept = _Kept(request, revision)
        kept.task = self._spawn(self._record(kept), f"kept session {request.session_id}")
        try:
            while True:
                event = await kept.next()
                yield event
                if event.finish_reason:
                    return
        finally:
            kept.has_reader = False
            keep_seconds = min(request.keep_seconds, self._limits.keep_seconds)
            asyncio.get_running_loop().call_later(keep_seconds, self._forget, kept)

    def find(self, session_ids: Iterable[str], highest_epoch: Callable[[str], int]) -> list[KeptSession]:
        """Return what is known of these sessions.

        Args:
            session_ids: Of any; `MAX_ASKED_SESSIONS` of them are looked at.
            highest_epoch: Of the owners that a session has had on this node; negative = none.
        """
        found = []
        for session_id in list(session_ids)[:MAX_ASKED_SESSIONS]:
            kept = self._kept.get(session_id)
            if kept is not None:
                found.append(kept.described())
            elif highest_epoch(session_id) >= 0:
                found.append(KeptSession(session_id=session_id, epoch=highest_epoch(session_id)))
        return found

    def release(self, session_id: str, epoch: int) -> None:
        """End a session's run under this epoch, and earlier ones; its tokens stay for their time."""
        for (running_id, running_epoch), kept in self._running.items():
            if running_id == session_id and running_epoch <= epoch and kept.task is not None:
                kept.task.cancel()

    async def _record(self, kept: _Kept) -> None:
        """Read a session to its end, whether or not somebody follows."""
        running = kept.request.session_id, kept.request.epoch
        try:
            async with self._open_session(kept.request) as session:
                self._running[running] = kept
                self._hold(kept)
                while not kept.finish_reason:
                    event = await session.next()
                    earlier_weight = kept.weight
                    kept.take(event)
                    if self._is_held(kept):
                        self._weight += kept.weight - earlier_weight
                        self._make_room()
        except StokerError as error:
            kept.fail(error)
        except asyncio.CancelledError:  # released, or nobody came back: this task alone ends
            kept.fail(ReplicaGone(f"session {kept.request.session_id} was ended here"))
        finally:
            if self._running.get(running) is kept:
                del self._running[running]

    def _hold(self, kept: _Kept) -> None:
        """Put a session that runs in the place of its earlier owner's."""
        earlier = self._kept.pop(kept.request.session_id, None)
        if earlier is not None:
            kept.inherit(earlier)
            self._weight -= earlier.weight
        self._kept[kept.request.session_id] = kept
        self._weight += kept.weight
        self._make_room()

    def _make_room(self) -> None:
        """Forget the oldest sessions beyond the limits; those with a reader go on for it."""
        limits = self._limits
        while len(self._kept) > limits.sessions or (len(self._kept) > 1 and self._weight > limits.tokens):
            without_reader = (kept for kept in self._kept.values() if not kept.has_reader)
            self._forget(next(without_reader, next(iter(self._kept.values()))))

    def _forget(self, kept: _Kept) -> None:
        if self._is_held(kept):
            del self._kept[kept.request.session_id]
            self._weight -= kept.weight
        if not kept.has_reader and kept.task is not None:
            kept.task.cancel()

    def _is_held(self, kept: _Kept) -> bool:
        return self._kept.get(kept.request.session_id) is kept


def _weight(token: Token) -> int:
    return 1 + len(token.top_logprobs)
