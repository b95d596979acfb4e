"""A session's run: from a replica's stream of tokens into the sink, and on elsewhere after a failure.

The token log (`Session`) is the whole truth, so whoever goes on gets it whole, under the next epoch. What may
be tried, and when, is decided by `hops`; this shell streams, looks for replicas and measures.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass

from services.gateway import metrics
from services.gateway.agents import Agents
from services.gateway.hops import GiveUp, GoOn, HopPolicy, Hops, after, redeployed
from services.gateway.job import Job
from services.gateway.placement import Placement
from services.gateway.routes import Replica
from services.gateway.session import Session
from services.gateway.text_request import Waiting
from stoker import log
from stoker.errors import CapacityError, Fenced, StokerError, StreamLost
from stoker.v1 import session_pb2


@dataclass(slots=True, kw_only=True)
class _Resumption:
    """A hop on its way, until its first token."""

    cause: str
    from_replica_id: str
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

    async def run(self, replica: Replica) -> None:
        """Generate to the end, beginning at `replica`.

        Raises:
            StokerError: Why it ended early; StreamLost when the client has seen tokens.
        """
        origin, model = replica, self._job.trace.model
        try:
            while True:
                try:
                    await self._stream(replica)
                except StokerError as error:
                    replica = await self._go_on(error, replica, origin)
                else:
                    return
        except StreamLost:
            metrics.STREAMS_LOST.labels(model).inc()
            raise
        finally:
            gauge = metrics.RUNNING if self._has_first_token else metrics.WAITING
            gauge.labels(model).dec()
            metrics.GENERATION_TOKENS.labels(model).inc(len(self._session.token_ids))

    # --- streaming ---

    async def _stream(self, replica: Replica) -> None:
        job, session, sink, choice = self._job, self._session, self._job.sink, self._choice
        order = session.generate_request(
            model=job.trace.model,
            replica_id=replica.replica_id,
            request_id=job.trace.request_id,
            resume_mode=self._resume_mode(),
        )
        job.trace.replica_ids.append(replica.replica_id)
        self._placement.in_flight[replica.replica_id] += 1
        try:
            events = self._agents.generate(replica, order, timeout_seconds=job.left_seconds())
            async with aclosing(events):
                async for event in events:
                    try:
                        delta = session.feed(event)
                    except Fenced as error:
                        self._note_fenced(replica, error)
                        continue
                    if self._resumption is not None:
                        self._note_resumed(self._resumption, replica)
                    if event.tokens and not self._has_first_token:
                        self._note_first_token()
                    if choice == 0 and event.HasField("timings"):
                        job.trace.note_timings(event.timings)
                    await sink.delta(choice, delta)
                    if session.finish_reason is not None:
                        return
        finally:
            self._placement.leave(replica.replica_id)

    def _resume_mode(self) -> session_pb2.ResumeMode.ValueType:
        name = self._job.trace.model
        if name in self._placement.table:
            return self._placement.table.find(name).resume_mode
        return session_pb2.RESUME_MODE_EXACT  # deleted meanwhile: its replicas still drain

    def _note_fenced(self, replica: Replica, error: Fenced) -> None:
        metrics.FENCED_EVENTS.labels(self._job.trace.model).inc()
        log.get().warning("tokens.refused", replica_id=replica.replica_id, message=error.message)

    def _note_first_token(self) -> None:
        self._has_first_token = True
        model = self._job.trace.model
        metrics.WAITING.labels(model).dec()
        metrics.RUNNING.labels(model).inc()
        if self._job.trace.first_token_seconds is None:
            self._job.trace.first_token_seconds = self._job.age_seconds()

    # --- going on elsewhere ---

    async def _go_on(self, error: StokerError, at: Replica, origin: Replica) -> Replica:
        """Return the replica that goes on with the session after `at` failed.

        Raises:
            StokerError: There is none, or it must not go on.
        """
        clock = self._job.clock
        if self._resumption is None:
            self._resumption = _Resumption(
                cause=error.code,
                from_replica_id=at.replica_id,
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
                self._session.epoch += 1
                self._resumption.found_seconds = clock.now_seconds()
                return replica

    def _decide(self, error: StokerError, at: Replica | None) -> GoOn:
        decided = after(
            self._hops,
            error,
            at=at,
            tokens=len(self._session.token_ids),
            begun=self._has_begun,
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
        found = await placement.acquire(self._job, failed=self._hops.failed, limit_seconds=limit_seconds)
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
            from_replica_id=resumption.from_replica_id,
            to_replica_id=replica.replica_id,
            to_node_id=replica.node_id,
            epoch=self._session.epoch,
            tokens=resumption.tokens,
            search_seconds=round(search_seconds, 6),
            replay_seconds=round(replay_seconds, 6),
        )
