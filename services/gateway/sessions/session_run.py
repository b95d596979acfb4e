"""A session's run: from a replica's stream of tokens into the sink, and on elsewhere after a failure.

The token log (`Session`) is the whole truth, so whoever goes on gets it whole, under the next epoch. What may
be tried, and when, is decided by `hops`; this shell streams, looks for replicas and measures.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

from services.gateway import metrics
from services.gateway.job import Job
from services.gateway.routing.agents import Agents
from services.gateway.routing.placement import Placement
from services.gateway.routing.routes import Replica
from services.gateway.sessions.hops import GiveUp, GoOn, HopPolicy, Hops, after, redeployed
from services.gateway.sessions.move_report import Switched, report_moved
from services.gateway.sessions.moved_events import in_order, next_or_moved
from services.gateway.sessions.mover import Events, Moved, Mover
from services.gateway.sessions.request_key import feed_unseen
from services.gateway.sessions.session import Delta, Session
from services.gateway.sessions.waited import Waited
from services.gateway.text_request import Waiting
from stoker import log
from stoker.errors import CapacityError, Fenced, StokerError, StreamLost
from stoker.v1 import session_pb2

MAX_CLAIMS = 8
"""Earlier owners, unknown to us, that a session may turn out to have had before it begins here."""


@dataclass(slots=True, kw_only=True)
class _Resumption:
    """A hop on its way, until its first token."""

    cause: str
    source: Replica
    failed_seconds: float
    tokens: int
    found_seconds: float = 0.0


class SessionRun:
    """One session of a job.

    Args:
        session: The session.
        choice: Its number in the job.
        job: The job.
        placement: Finds replicas.
        agents: Node agents.
        policy: How long it looks for another replica.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the parts it joins
        self,
        session: Session,
        choice: int,
        job: Job,
        placement: Placement,
        agents: Agents,
        policy: HopPolicy,
    ) -> None:
        self._session = session
        self._choice = choice
        self._job = job
        self._placement = placement
        self._agents = agents
        self._policy = policy
        self._hops = Hops()
        self._resumption: _Resumption | None = None
        self._has_first_token = False
        self._counts_as_running = False
        self._token_seconds = 0.0
        self._switched: Switched | None = None
        self._mover: Mover | None = None
        self._at: Replica | None = None
        self._claims_left = MAX_CLAIMS
        session.waited = Waited(since_seconds=job.trace.started_seconds)

    async def run(self, replica: Replica) -> None:
        """Generate to the end, beginning at `replica`.

        Raises:
            StokerError: Why it ended early; StreamLost when the client has seen tokens.
        """
        origin, model = replica, self._job.trace.model
        try:
            while True:
                if self._session.finish_reason is not None:
                    return  # an earlier gateway had all of it
                try:
                    await self._stream(replica)
                except Fenced as error:
                    self._claim_above(error)
                except StokerError as error:
                    replica = await self._go_on(error, self._at or replica, origin)
                else:
                    return
        except StreamLost:
            metrics.STREAMS_LOST.labels(model).inc()
            raise
        finally:
            gauge = metrics.RUNNING if self._counts_as_running else metrics.WAITING
            gauge.labels(model).dec()
            metrics.GENERATION_TOKENS.labels(model).inc(len(self._session.token_ids))

    # --- streaming ---

    async def _stream(self, replica: Replica) -> None:
        """Read the session to its end at `replica`, and wherever it moves meanwhile."""
        job = self._job
        order = self._session.generate_request(
            model=job.trace.model,
            replica_id=replica.replica_id,
            request_id=job.trace.request_id,
            now_seconds=job.clock.now_seconds(),
            resume_mode=self._resume_mode(),
        )
        events = self._agents.generate(replica, order, timeout_seconds=job.left_seconds())
        moved = await self._read(replica, events)
        while moved is not None:
            moved = await self._read(moved.replica, in_order(moved, self._session.token_ids))

    async def _read(self, replica: Replica, events: Events) -> Moved | None:
        """Take a replica's events until the session has ended, or moved."""
        self._at = replica
        self._job.trace.replica_ids.append(replica.replica_id)
        self._placement.in_flight[replica.replica_id] += 1
        self._mover = None
        try:
            async with aclosing(events):
                while self._session.finish_reason is None:
                    mover: Mover | None = self._mover
                    event = await (anext(events) if mover is None else next_or_moved(events, mover))
                    if isinstance(event, Moved):
                        self._switch(event, replica)
                        return event
                    if event.HasField("leave") and (mover is None or has_given_up(mover)):
                        self._mover = self._move(replica, event.leave)
                    await self._take(event, replica)
                return None
        finally:
            if self._mover is not None:
                await self._mover.close()
            self._placement.leave(replica.replica_id)

    async def _take(self, event: session_pb2.GenerateEvent, replica: Replica) -> None:
        try:
            delta = self._feed(event)
        except Fenced as error:
            self._note_fenced(replica, error)
            return
        self._claims_left = 0
        if self._resumption is not None:
            self._note_resumed(self._resumption, replica)
        if event.tokens:
            self._note_tokens()
        await self._job.sink.delta(self._choice, delta)
        if self._has_first_token and not self._counts_as_running:
            self._count_as_running()
        if self._choice == 0 and event.HasField("timings"):
            self._job.trace.note_timings(event.timings)

    def _claim_above(self, error: Fenced) -> None:
        """Own the session after an owner that was not found, its node being away: the client came here last.

        Only before anything of it has come: what another gateway goes on with is not taken back; raises then.
        """
        highest = error.details.get("highest_epoch")
        if self._job.request.key is None or not isinstance(highest, int) or not self._claims_left:
            raise error
        self._claims_left -= 1
        self._session.own_after(max(highest, self._session.epoch))
        log.get().info("session.claimed", session_id=self._session.session_id, epoch=self._session.epoch)

    def _feed(self, event: session_pb2.GenerateEvent) -> Delta:
        key = self._job.request.key
        if key is None or not key.seen:
            return self._session.feed(event)
        return feed_unseen(self._session, event, key.seen[self._choice])

    def _resume_mode(self) -> session_pb2.ResumeMode.ValueType:
        name = self._job.trace.model
        if name in self._placement.table:
            return self._placement.table.find(name).resume_mode
        return session_pb2.RESUME_MODE_EXACT  # deleted meanwhile: its replicas still drain

    def _note_fenced(self, replica: Replica, error: Fenced) -> None:
        metrics.FENCED_EVENTS.labels(self._job.trace.model).inc()
        log.get().warning("tokens.refused", replica_id=replica.replica_id, message=error.message)

    def _note_tokens(self) -> None:
        earlier_seconds, self._token_seconds = self._token_seconds, self._job.clock.now_seconds()
        if self._session.waited.since_seconds is not None:
            self._session.waited = self._session.waited.served(self._token_seconds)
        if self._switched is not None:
            numerics = self._note_numerics(self._switched.source, self._switched.moved.replica, "move")
            report_moved(self._switched, self._session, self._job.trace, self._token_seconds, numerics)
            self._switched = None
        elif self._mover is not None and self._has_first_token:
            self._mover.note_token(self._token_seconds - earlier_seconds)
        if self._has_first_token:
            return
        self._has_first_token = True
        if self._job.trace.first_token_seconds is None:
            self._job.trace.first_token_seconds = self._job.age_seconds()

    def _count_as_running(self) -> None:
        """Tell the metrics of the first token, which is on its way to the client by now."""
        self._counts_as_running = True
        model = self._job.trace.model
        metrics.WAITING.labels(model).dec()
        metrics.RUNNING.labels(model).inc()

    # --- moving ---

    def _move(self, replica: Replica, leave: session_pb2.Leave) -> Mover:
        log.get().info(
            "session.move_begun",
            session_id=self._session.session_id,
            from_replica_id=replica.replica_id,
            reason=leave.reason,
            grace_seconds=leave.grace_seconds,
            to_replica_id=leave.to_replica_id,
        )
        return Mover(
            self._session,
            replica,
            self._job,
            self._placement,
            self._agents,
            self._resume_mode(),
            leave,
            policy=self._policy,
        )

    def _switch(self, moved: Moved, source: Replica) -> None:
        """Make the destination the session's owner."""
        if (
            self._job.request.key is not None
        ):  # else the source would go on as if a client might come back to it
            self._agents.release(source, self._session.session_id, self._session.epoch)
        self._session.epoch = moved.epoch
        self._switched = Switched(
            moved=moved,
            source=source,
            tokens=len(self._session.token_ids),
            last_token_seconds=self._token_seconds,
            seconds=self._job.clock.now_seconds() - moved.began_seconds,
        )

    # --- going on elsewhere ---

    async def _go_on(self, error: StokerError, at: Replica, origin: Replica) -> Replica:
        """Return the replica that goes on with the session after `at` failed.

        Raises:
            StokerError: There is none, or it must not go on.
        """
        clock = self._job.clock
        self._switched = None  # a move whose destination died before its first token was no move
        self._session.waited = self._session.waited.interrupted(clock.now_seconds())
        if self._resumption is None:
            self._resumption = _Resumption(
                cause=error.code,
                source=at,
                failed_seconds=clock.now_seconds(),
                tokens=len(self._session.token_ids),
            )
        if not isinstance(error, CapacityError):
            self._placement.report_failed(at)
        step = self._decide(error, at)
        while True:
            self._hops = step.hops
            if step.pause_seconds:
                await self._job.sink.waiting(Waiting(state="resuming", reason=error.message))
                await clock.sleep(step.pause_seconds)
            try:
                replica = await self._find(origin)
            except StokerError as refusal:
                self._job.left_seconds()  # the request's own deadline ends the search
                error = refusal
                step = self._decide(refusal, None)
            else:
                self._session.epoch = self._session.claim_epoch()
                self._resumption.found_seconds = clock.now_seconds()
                return replica

    def _decide(self, error: StokerError, at: Replica | None) -> GoOn:
        decided = after(
            self._hops,
            error,
            at=at,
            tokens=len(self._session.token_ids),
            begun=self._has_begun,
            whole=self._job.request.whole,
            now_seconds=self._job.clock.now_seconds(),
            policy=self._policy,
        )
        if isinstance(decided, GiveUp):
            raise decided.error from error
        return decided

    @property
    def _has_begun(self) -> bool:
        """Say whether the client has seen a token of any of the job's sessions."""
        return self._job.trace.first_token_seconds is not None

    async def _find(self, origin: Replica) -> Replica:
        placement, model = self._placement, self._job.trace.model
        like = origin if self._has_begun else None
        found = placement.ready(placement.table.find(model), self._hops.failed, like)
        if found is not None:
            return found
        limit_seconds = self._policy.resume_timeout_seconds if self._has_begun else float("inf")
        found = await placement.acquire(
            self._job, failed=self._hops.failed, limit_seconds=limit_seconds, waited=self._session.waited
        )
        if like is not None and not found.continues(like):
            raise redeployed(model, len(self._session.token_ids))
        return found

    def _note_resumed(self, resumption: _Resumption, replica: Replica) -> None:
        """Count a hop that has arrived and write its canonical line."""
        self._resumption = None
        self._hops = self._hops.running()
        trace = self._job.trace
        now_seconds = self._job.clock.now_seconds()
        search_seconds = resumption.found_seconds - resumption.failed_seconds
        replay_seconds = now_seconds - resumption.found_seconds
        trace.hops += 1
        trace.resumed_tokens += resumption.tokens
        trace.resume_seconds += search_seconds + replay_seconds
        metrics.RESUMES.labels(trace.model, resumption.cause).inc()
        metrics.RESUMED_TOKENS.labels(trace.model).inc(resumption.tokens)
        metrics.RESUME_SECONDS.labels(trace.model, "search").observe(search_seconds)
        metrics.RESUME_SECONDS.labels(trace.model, "replay").observe(replay_seconds)
        log.get().info(
            "session.resumed",
            request_id=trace.request_id,
            session_id=self._session.session_id,
            model=trace.model,
            cause=resumption.cause,
            from_replica_id=resumption.source.replica_id,
            to_replica_id=replica.replica_id,
            to_node_id=replica.node_id,
            epoch=self._session.epoch,
            tokens=resumption.tokens,
            search_seconds=round(search_seconds, 6),
            replay_seconds=round(replay_seconds, 6),
            **(self._note_numerics(resumption.source, replica, "resume") if resumption.tokens else {}),
        )

    def _note_numerics(self, source: Replica, destination: Replica, way: str) -> dict[str, str]:
        """Count a stream that goes on where the last bits may differ; return what its log line says of it."""
        if destination.computes_like(source):
            return {}
        metrics.NUMERICS_CHANGES.labels(self._job.trace.model, way).inc()
        return {"from_numerics": source.numerics, "to_numerics": destination.numerics}


def has_given_up(mover: Mover) -> bool:
    """Say whether a move came to nothing and holds nothing; one that waits to be switched to holds a call."""
    return mover.task.done() and mover.task.result() is None
