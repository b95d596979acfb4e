"""Sessions of one worker: many calls of gateways over the worker's one connection for sessions.

The worker's events are handed on as they are; this module only finds whom they belong to. Commands and steps
travel over a link (`stoker.frames`) where there is one. The `Run` call carries them otherwise; beside a link
it tells that the worker is there: gRPC pings it, and so finds one that hangs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from stoker.errors import BY_CODE, CapacityError, Fenced, PeerError, QueueFull, StokerError
from stoker.frames import Link
from stoker.rpc import cancelled_after, translated
from stoker.v1.session_pb2 import GenerateEvent, GenerateRequest, Leave
from stoker.v1.worker_pb2 import CancelSession, LoadEnd, RunCommand, SessionEvent, StepEvent

if TYPE_CHECKING:
    from stoker.v1.worker_pb2_grpc import WorkerAsyncStub

MAX_BUFFERED_EVENTS = 4096
"""Of one session, when its client reads more slowly than the worker generates."""

LEAVING_SECONDS = 10.0
"""Whoever was asked to leave and is here after this has asked in vain to be taken elsewhere: others' turn."""


class RelayedSession:
    """One session, as its `Generate` call sees it. Made by `SessionRelay.open`."""

    __slots__ = (
        "_error",
        "_events",
        "_on_news",
        "_waiter",
        "asked_to_leave_seconds",
        "context_tokens",
        "epoch",
        "request_id",
        "session_id",
        "started",
        "waiting_since_seconds",
    )

    def __init__(
        self,
        session_id: str,
        epoch: int,
        context_tokens: int = 0,
        *,
        request_id: str = "",
        waiting_since_seconds: float = 0.0,
    ) -> None:
        self.session_id = session_id
        self.request_id = request_id
        self.epoch = epoch
        self.context_tokens = context_tokens
        """Prompt and output so far."""
        self.waiting_since_seconds = waiting_since_seconds
        """When it began to wait, what it waited before it came here included; until it has `started`."""
        self.started = False
        self.asked_to_leave_seconds: float | None = None
        """When its reader was last asked to move it, monotonic; None = it was not."""
        self._events: deque[GenerateEvent] = deque()
        self._error: StokerError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_news: Callable[[], None] = _nobody_follows

    def is_on_its_way(self, now_seconds: float) -> bool:
        """Tell whether its reader was asked so lately that it may still be moving it."""
        asked_seconds = self.asked_to_leave_seconds
        return asked_seconds is not None and now_seconds - asked_seconds < LEAVING_SECONDS

    def follow(self, on_news: Callable[[], None]) -> None:
        """Have it called when there is an event or an error, in the event loop; it may close the session."""
        self._on_news = on_news

    def poll(self) -> GenerateEvent | None:
        """Return the next event, None if it has not come; the last one carries a finish reason.

        Raises:
            StokerError: The session ended without a finish; earlier events were returned first.
        """
        if self._events:
            return self._events.popleft()
        if self._error is not None:
            raise self._error
        return None

    async def next(self) -> GenerateEvent:
        """Return the next event once it is there; raises as `poll`."""
        while (event := self.poll()) is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return event

    def is_full(self) -> bool:
        """Tell whether the client lags too far behind."""
        return len(self._events) >= MAX_BUFFERED_EVENTS

    def put(self, event: GenerateEvent) -> None:
        """Take an event of the worker."""
        self._events.append(event)
        self._wake()

    def fail(self, error: StokerError) -> None:
        """End the session with an error; the first one counts."""
        if self._error is None:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._on_news()


def _nobody_follows() -> None:
    """Stands for a follower."""


def _turn(session: RelayedSession, now_seconds: float) -> tuple[float, bool, int]:
    """Return when a session is asked to leave, among those of its replica: the smallest first."""
    asked_seconds = session.asked_to_leave_seconds
    if session.is_on_its_way(now_seconds):
        turn = -1.0
    elif asked_seconds is None:
        turn = 0.0
    else:
        turn = 1.0 + asked_seconds  # in vain; who was asked the longest ago comes first
    return turn, session.started, session.context_tokens


class SessionRelay:
    """Multiplexes sessions over a worker's connection.

    Args:
        stub: The worker.
        peer: Who it is, for people.
        max_sessions: More are refused.
        on_change: Called when the number of running or waiting sessions changed.
        now_seconds: The clock.
        on_load_end: Called before the first token of a worker that took sessions while its weights arrived.
    """

    def __init__(  # noqa: PLR0913 - what it joins
        self,
        stub: WorkerAsyncStub,
        *,
        peer: str,
        max_sessions: int,
        on_change: Callable[[], None],
        now_seconds: Callable[[], float],
        on_load_end: Callable[[LoadEnd], None] = lambda _: None,
    ) -> None:
        self._stub = stub
        self._peer = peer
        self._max_sessions = max_sessions
        self._on_change = on_change
        self._now_seconds = now_seconds
        self._on_load_end = on_load_end
        self._sessions: dict[str, RelayedSession] = {}
        self._commands: asyncio.Queue[RunCommand] = asyncio.Queue()  # bounded: two per session at most
        self._link: Link | None = None
        self._link_ended = asyncio.Event()
        self._link_end = ""
        self._error: StokerError | None = None
        self._running = 0
        self._idle_since_seconds = now_seconds()

    @property
    def session_count(self) -> int:
        """Return how many sessions are open."""
        return len(self._sessions)

    @property
    def running_count(self) -> int:
        """Return how many sessions have had an event."""
        return self._running

    def context_tokens(self) -> int:
        """Return the tokens, prompt and output so far, of all sessions that run."""
        return sum(session.context_tokens for session in self._sessions.values() if session.started)

    def longest_wait_seconds(self) -> float | None:
        """Return the longest wait of the sessions that have had no event yet; None = none waits."""
        since = [each.waiting_since_seconds for each in self._sessions.values() if not each.started]
        return max(0.0, self._now_seconds() - min(since)) if since else None

    def has_request(self, request_id: str) -> bool:
        """Tell whether sessions of a request run here."""
        return any(session.request_id == request_id for session in self._sessions.values())

    def idle_seconds(self) -> float:
        """Return the time since the last session ended; 0 while one is open."""
        return 0.0 if self._sessions else self._now_seconds() - self._idle_since_seconds

    def open(self, request: GenerateRequest) -> RelayedSession:
        """Submit a session; `close` it in any case.

        Raises:
            QueueFull: Too many sessions.
            Fenced: The same session is open here under this epoch or a later one.
            StokerError: The relay has ended.
        """
        if self._error is not None:
            raise self._error
        earlier = self._sessions.get(request.session_id)
        waiting_since_seconds = self._now_seconds() - max(0.0, request.waited_seconds)
        if earlier is not None:
            if request.epoch <= earlier.epoch:
                raise Fenced(
                    f"session {request.session_id} has epoch {earlier.epoch} here; "
                    f"a request with epoch {request.epoch} is late",
                    details={"highest_epoch": earlier.epoch},
                )
            if not earlier.started:
                waiting_since_seconds = min(waiting_since_seconds, earlier.waiting_since_seconds)
            # Not cancelled there: the worker goes on from what the earlier owner had computed.
            self._forget(earlier)
            earlier.fail(Fenced(f"session {request.session_id} was taken over by epoch {request.epoch}"))
        if len(self._sessions) >= self._max_sessions:
            raise QueueFull(
                f"replica {request.replica_id} has {len(self._sessions)} sessions, its maximum",
                retry_after_seconds=1.0,
            )
        session = RelayedSession(
            request.session_id,
            request.epoch,
            context_tokens=len(request.prompt_token_ids) + len(request.generated_token_ids),
            request_id=request.request_id,
            waiting_since_seconds=waiting_since_seconds,
        )
        self._sessions[request.session_id] = session
        self._tell(RunCommand(submit=request))
        self._on_change()
        return session

    def close(self, session: RelayedSession) -> None:
        """Forget a session; one that the worker still runs is cancelled there."""
        if self._forget(session) and self._error is None:
            self._tell(RunCommand(cancel=CancelSession(session_id=session.session_id)))

    def cut(self, session_id: str, *, below_epoch: int) -> None:
        """End a session here if an earlier owner runs it: a later one has begun elsewhere."""
        session = self._sessions.get(session_id)
        if session is not None and session.epoch < below_epoch:
            session.fail(Fenced(f"session {session_id} was taken over by epoch {below_epoch}"))
            self.close(session)

    def ask_to_leave(
        self,
        reason: str,
        grace_seconds: float,
        *,
        to_replica_id: str = "",
        request_id: str = "",
        max_sessions: int = 0,
    ) -> int:
        """Tell sessions' readers to move them to another replica; return how many were told.

        Args:
            reason: For people.
            grace_seconds: Until the replica ends; 0 = it does not.
            to_replica_id: Where they should go; empty = wherever the model is ready.
            request_id: Only this request's sessions; empty = all.
            max_sessions: At most so many; first those on their way (a repeated order asks nobody else), last
                those asked in vain; else those that wait, then the shortest; 0 = all.
        """
        now_seconds = self._now_seconds()
        leave = Leave(reason=reason, grace_seconds=grace_seconds, to_replica_id=to_replica_id)
        leaving = [session for session in self._sessions.values() if request_id in ("", session.request_id)]
        if max_sessions:
            leaving.sort(key=lambda each: _turn(each, now_seconds))
            del leaving[max_sessions:]
        for session in leaving:
            if not session.is_on_its_way(now_seconds):  # asking again must not keep it first for ever
                session.asked_to_leave_seconds = now_seconds
            session.put(GenerateEvent(epoch=session.epoch, leave=leave))
        return len(leaving)

    def fail_all(self, error: StokerError) -> None:
        """End every session, and refuse new ones, with this error."""
        self._error = self._error or error
        for session in list(self._sessions.values()):
            self._forget(session)
            session.fail(error)

    async def run(self) -> None:
        """Relay until the worker ends the stream.

        Raises:
            PeerError: The worker cannot be reached any more.
        """
        self._idle_since_seconds = self._now_seconds()
        calling = asyncio.ensure_future(self._call())
        losing = asyncio.ensure_future(self._link_ended.wait())
        try:
            await asyncio.wait([calling, losing], return_when=asyncio.FIRST_COMPLETED)
            if not calling.done():
                raise PeerError(f"{self._peer} cannot be reached: {self._link_end}")
            calling.result()
        finally:
            calling.cancel()
            losing.cancel()
            await asyncio.gather(calling, losing, return_exceptions=True)

    def use(self, link: Link) -> None:
        """Speak to the worker over a link, which brings its frames to `take_frame` and its end to `lose`."""
        self._link = link

    def take_frame(self, frame: bytes) -> None:
        """Take a step that came over the link.

        Raises:
            PeerError: There is none in the frame.
        """
        try:
            step = StepEvent.FromString(frame)
        except DecodeError as error:
            raise PeerError(f"a frame of {self._peer} is no step: {error}") from error
        self._take(step)

    def lose(self, reason: str) -> None:
        """Take note that the link has ended: no token can come any more."""
        self._link_end = reason
        self._link_ended.set()

    async def _call(self) -> None:
        with translated(self._peer), cancelled_after(self._stub.Run(self._submitted())) as steps:
            async for step in steps:
                self._take(step)

    def _take(self, step: StepEvent) -> None:
        if step.HasField("load_end"):
            self._on_load_end(step.load_end)
        for item in step.sessions:
            session = self._sessions.get(item.session_id)
            if session is not None:
                self._deliver(session, item)

    def _tell(self, command: RunCommand) -> None:
        if self._link is None:
            self._commands.put_nowait(command)
        else:
            self._link.send(command.SerializeToString())

    async def _submitted(self) -> AsyncIterator[RunCommand]:
        while True:
            yield await self._commands.get()

    def _deliver(self, session: RelayedSession, item: SessionEvent) -> None:
        if item.HasField("error"):
            if item.epoch != session.epoch:
                return  # as below: the present owner's session goes on
            self._forget(session)
            session.fail(BY_CODE.get(item.error.code, StokerError)(item.error.message))
            return
        event = item.event
        if event.epoch != session.epoch:
            return  # of an owner that was taken over
        if session.is_full():
            session.fail(
                CapacityError(
                    f"session {session.session_id} was cancelled: its client lags {MAX_BUFFERED_EVENTS} "
                    "events behind"
                )
            )
            self.close(session)
            return
        session.context_tokens += len(event.tokens)
        if event.finish_reason:  # first: whoever follows closes the session when it has this
            self._forget(session)
        session.put(event)
        if not session.started and self._sessions.get(session.session_id) is session:
            session.started = True
            self._running += 1
            self._on_change()

    def _forget(self, session: RelayedSession) -> bool:
        """Take a session off the list; tell whether it was on it."""
        if self._sessions.get(session.session_id) is not session:
            return False
        del self._sessions[session.session_id]
        self._running -= session.started
        if not self._sessions:
            self._idle_since_seconds = self._now_seconds()
        self._on_change()
        return True
