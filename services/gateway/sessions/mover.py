"""A planned move of one session: beside its stream, until another replica is ready to own it. A shell.

The source goes on, but for a moment before the switch in which it stands still, after which it goes on by
itself. So a move that fails, at any point, changes nothing. Ownership changes when the session's epoch does,
in one step of the gateway's loop: from then on the source's tokens are refused, and its call is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass

from services.gateway import metrics
from services.gateway.job import Job
from services.gateway.routing.agents import Agents
from services.gateway.routing.placement import Placement
from services.gateway.routing.routes import Replica
from services.gateway.sessions.hops import HopPolicy
from services.gateway.sessions.kv_rounds import KvRounds, Shipped
from services.gateway.sessions.move_gaps import MoveGaps, Phase
from services.gateway.sessions.move_rounds import (
    Abandon,
    Again,
    Switch,
    after_round,
    hold_seconds,
    unseen,
)
from services.gateway.sessions.session import Session
from stoker import log
from stoker.errors import PeerError, StokerError
from stoker.ids import ReplicaId, new_id
from stoker.v1 import session_pb2

Events = AsyncGenerator[session_pb2.GenerateEvent]

HOLD_TIMEOUT_SECONDS = 5.0
"""Longest wait for a source to stand still: its step ends first."""
NAMED_SECONDS = 10.0
"""How long a destination that was named may be missing in the routes."""
RETRY_SECONDS = 0.25
"""Between two tries to find a destination, or to move there."""
MAX_TRIES = 5
"""Destinations that may fail under one move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A destination that is level with the source."""

    replica: Replica
    epoch: int
    """Under which it owns the session."""
    first: session_pb2.GenerateEvent
    """Of its stream, read already."""
    rest: Events
    migration_id: str
    rounds: int
    recomputed_tokens: int
    """By the destination: prompt and output, over all rounds."""
    shipped: Shipped
    reason: str
    """Of the move, for people."""
    began_seconds: float
    gaps: MoveGaps
    """So far."""


class Mover:
    """Moves one session once. Belongs to the stream that runs beside it.

    Args:
        session: Read here, never changed.
        origin: Where the session runs.
        job: Its job.
        placement: Finds the destination.
        agents: Node agents.
        resume_mode: How tokens get into the destination.
        leave: Why it moves, and where to. Where its replica stays it goes there or nowhere.
        policy: Whether keys and values are shipped, where they can be, and of what sessions all.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the parts it joins
        self,
        session: Session,
        origin: Replica,
        job: Job,
        placement: Placement,
        agents: Agents,
        resume_mode: session_pb2.ResumeMode.ValueType,
        leave: session_pb2.Leave,
        policy: HopPolicy,
    ) -> None:
        self._policy = policy
        self._leave = leave
        ends_seconds = job.clock.now_seconds() + leave.grace_seconds if leave.grace_seconds else None
        self._kv = KvRounds(session, origin, job, agents, ends_seconds)
        self._session = session
        self._origin = origin
        self._job = job
        self._placement = placement
        self._agents = agents
        self._resume_mode = resume_mode
        self._open: dict[Events, tuple[Replica, session_pb2.GenerateRequest]] = {}
        self._phase = Phase.FIND
        self._gaps = MoveGaps()
        self._step_seconds = 0.0
        self._news = asyncio.Event()
        self._is_held = False
        self._task = asyncio.create_task(self._move(), name=f"move {session.session_id}")  # ended by `close`

    @property
    def task(self) -> asyncio.Task[Moved | None]:
        """Return the move: its result is where to switch to, or None when it was given up."""
        return self._task

    def note_token(self, gap_seconds: float) -> None:
        """Take note of a token of the source, so long after the one before."""
        self._gaps.note(self._phase, gap_seconds)
        self._step_seconds = gap_seconds
        self._news.set()

    async def close(self) -> None:
        """End the move, and its calls unless they were taken over.

        A session with a key would go on at the destination, as after its client has left: nobody comes there.
        """
        self._task.cancel()
        left = False
        while not self._task.done():
            try:
                await asyncio.wait({self._task})
            except asyncio.CancelledError:
                left = True  # the client's; not before the move has let go of its calls
        for destination, order in self._open.values():
            if order.keep_seconds:
                self._agents.release(destination, order.session_id, order.epoch)
        await self._drop(keep=None)
        if left:
            raise asyncio.CancelledError

    def take(self, moved: Moved) -> None:
        """Hand the destination's stream over; `close` leaves it alone from now on."""
        del self._open[moved.rest]

    async def _move(self) -> Moved | None:
        try:
            return await self._try()
        except Exception as error:  # noqa: BLE001 - a task boundary: a move must never harm its stream
            log.get().error("session.move_crashed", session_id=self._session.session_id, exc_info=error)
            return None

    async def _try(self) -> Moved | None:
        failed: list[ReplicaId] = []
        for _ in range(MAX_TRIES):
            self._phase = Phase.FIND
            destination = await self._named(failed)
            if destination is None:
                if not self._leave.grace_seconds:
                    return None
                destination = await self._find(failed)
            began_seconds = self._job.clock.now_seconds()
            try:
                return await self._follow(destination, began_seconds)
            except StokerError as error:
                await self._drop(keep=None)
                await self._let_go_on()
                failed.append(destination.replica_id)
                metrics.MOVES.labels(self._job.trace.model, "abandoned").inc()
                log.get().warning(
                    "session.move_abandoned",
                    session_id=self._session.session_id,
                    from_replica_id=self._origin.replica_id,
                    to_replica_id=destination.replica_id,
                    error_code=error.code,
                    message=error.message,
                )
                await self._job.clock.sleep(RETRY_SECONDS)
        return None

    async def _named(self, failed: list[ReplicaId]) -> Replica | None:
        """Return the destination that was asked for, once it is in the routes; None = there is none."""
        wanted, clock = ReplicaId(self._leave.to_replica_id), self._job.clock
        if not wanted or wanted in failed or wanted == self._origin.replica_id:
            return None
        until_seconds = clock.now_seconds() + NAMED_SECONDS
        while clock.now_seconds() < until_seconds:
            found = self._placement.named(self._job.trace.model, wanted)
            if found is not None:
                return found if found.continues(self._origin) else None
            await clock.sleep(RETRY_SECONDS)
        log.get().warning(
            "session.move_abandoned",
            session_id=self._session.session_id,
            to_replica_id=wanted,
            message=f"it was not in the routes within {NAMED_SECONDS:g} s",
        )
        return None

    async def _find(self, failed: list[ReplicaId]) -> Replica:
        """Return a replica that can go on with the session, waiting until there is one."""
        placement, model = self._placement, self._job.trace.model
        passed_over = [self._origin.replica_id, *failed]
        while True:
            found: Replica | None = None
            with suppress(StokerError):  # no room, no controller, deleted: the source goes on, there is time
                found = placement.ready(placement.table.find(model), passed_over, self._origin)
                if found is None:
                    waited_seconds = self._session.waited.seconds(self._job.clock.now_seconds())
                    found = await placement.start_another(self._job, waited_seconds=waited_seconds)
            if found and found.replica_id not in passed_over and found.continues(self._origin):
                return found
            await self._job.clock.sleep(RETRY_SECONDS)

    async def _follow(self, destination: Replica, began_seconds: float) -> Moved:
        """Run rounds at the destination until it is level.

        Raises:
            StokerError: It failed, or can't keep up.
        """
        self._phase = Phase.SHIP
        shipped = Shipped(why_not="switched_off")
        if self._policy.ships_kv:
            shipped = await self._kv.ship(destination)
        self._phase = Phase.COMPUTE
        if shipped.tokens:
            shipped = await self._stand_still(destination, shipped)
        can_hold = not shipped.tokens
        lag: int | None = None
        recomputed = -shipped.tokens
        for number in range(1, 1_000):
            tokens = len(self._session.token_ids)
            recomputed += len(self._session.prompt_token_ids) + tokens if lag is None else lag
            epoch = self._session.claim_epoch()
            events = self._round(destination, epoch)
            first = await anext(events)
            while first.epoch != epoch or first.HasField("leave"):
                if first.HasField("leave"):
                    raise PeerError(f"replica {destination.replica_id} is about to stop itself")
                first = await anext(events)
            await self._drop(keep=events)  # of the round before: the destination has taken it over
            unseen(first, self._session.token_ids, epoch)
            earlier, lag = lag, len(self._session.token_ids) - tokens
            match after_round(number=number, lag=lag, earlier_lag=earlier, can_hold=can_hold):
                case Again(is_held=is_held):
                    if is_held:
                        can_hold = False
                        await self._hold()
                case Abandon(why=why):
                    raise PeerError(why)
                case Switch():
                    return Moved(
                        replica=destination,
                        epoch=epoch,
                        first=first,
                        rest=events,
                        migration_id=new_id("mig"),
                        rounds=number,
                        recomputed_tokens=max(0, recomputed),
                        shipped=shipped,
                        reason=self._leave.reason,
                        began_seconds=began_seconds,
                        gaps=self._gaps,
                    )
        raise AssertionError("after_round bounds the rounds")

    async def _stand_still(self, destination: Replica, shipped: Shipped) -> Shipped:
        """Have the source stand still, and what a long session still lacks shipped; return what is there."""
        if self._session.token_count < self._policy.long_session_tokens:
            await self._hold()
            return shipped
        limit_seconds = hold_seconds(self._step_seconds)
        self._is_held = True  # or about to be, should this fail
        shipped, held_tokens = await self._kv.ship_last(destination, shipped, hold_seconds=limit_seconds)
        if not shipped.tokens:
            await self._let_go_on()
        elif held_tokens:
            await self._until(held_tokens, limit_seconds)
        else:  # its agent or worker is of an older release
            self._is_held = False
            await self._hold()
        return shipped

    async def _hold(self) -> bool:
        """Have the source stand still for the last round, and wait for its last tokens; False: it goes on."""
        limit_seconds, session = hold_seconds(self._step_seconds), self._session
        try:
            tokens = await self._agents.hold(
                self._origin,
                session.session_id,
                session.epoch,
                seconds=limit_seconds,
                timeout_seconds=HOLD_TIMEOUT_SECONDS,
            )
        except StokerError as error:
            log.get().info("session.not_held", session_id=session.session_id, message=error.message)
            return False
        self._is_held = True
        await self._until(tokens, limit_seconds)
        return True

    async def _until(self, tokens: int, limit_seconds: float) -> None:
        """Wait until the client has all tokens of a source that stands still."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                while self._session.token_count < tokens:
                    self._news.clear()
                    await self._news.wait()

    async def _let_go_on(self) -> None:
        """Tell a source that stands still to go on; it would so by itself, a moment later."""
        if not self._is_held:
            return
        self._is_held = False
        session = self._session
        with suppress(StokerError):
            await self._agents.hold(
                self._origin,
                session.session_id,
                session.epoch,
                seconds=0.0,
                timeout_seconds=HOLD_TIMEOUT_SECONDS,
            )

    def _round(self, destination: Replica, epoch: int) -> Events:
        order = self._session.generate_request(
            model=self._job.trace.model,
            replica_id=destination.replica_id,
            request_id=self._job.trace.request_id,
            now_seconds=self._job.clock.now_seconds(),
            resume_mode=self._resume_mode,
        )
        order.epoch = epoch
        order.follows = True
        events = self._agents.generate(destination, order, timeout_seconds=self._job.left_seconds())
        self._open[events] = destination, order
        return events

    async def _drop(self, keep: Events | None) -> None:
        for events in [events for events in self._open if events is not keep]:
            del self._open[events]
            with suppress(StokerError):
                await events.aclose()
