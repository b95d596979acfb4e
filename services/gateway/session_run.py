"""A session's run: from a replica's stream of tokens into the sink, trying other replicas while it may."""

from __future__ import annotations

from contextlib import aclosing

from services.gateway import metrics
from services.gateway.agents import Agents
from services.gateway.job import Job
from services.gateway.placement import Placement
from services.gateway.routes import Replica
from services.gateway.session import Session
from stoker.errors import PeerError, ReplicaGone, StokerError, WorkerDied
from stoker.ids import ReplicaId


class SessionRun:
    """One session of a job.

    Args:
        session: The session.
        choice: Its number in the job.
        job: The job.
        placement: Finds replicas.
        agents: Node agents.
    """

    def __init__(self, session: Session, choice: int, job: Job, placement: Placement, agents: Agents) -> None:
        self._session = session
        self._choice = choice
        self._job = job
        self._placement = placement
        self._agents = agents
        self._has_first_token = False

    async def run(self, replica: Replica, *, max_attempts: int) -> None:
        """Generate to the end.

        Args:
            replica: Where to begin.
            max_attempts: Replicas to try, this one included, while no token is there.

        Raises:
            StokerError: Why it ended early.
        """
        failed: list[ReplicaId] = []
        model = self._job.trace.model
        try:
            while True:
                try:
                    await self._stream(replica)
                except PeerError as error:
                    if not _elsewhere(error):
                        raise
                    failed.append(replica.replica_id)
                    self._placement.report_failed(replica)
                    if self._session.token_ids or len(failed) >= max_attempts:
                        raise
                else:
                    return
                self._session.epoch += 1
                replica = await self._next_replica(failed)
        finally:
            gauge = metrics.RUNNING if self._has_first_token else metrics.WAITING
            gauge.labels(model).dec()
            metrics.GENERATION_TOKENS.labels(model).inc(len(self._session.token_ids))

    async def _next_replica(self, failed: list[ReplicaId]) -> Replica:
        route = self._placement.table.find(self._job.trace.model)
        return self._placement.ready(route, failed) or await self._placement.acquire(self._job, failed=failed)

    async def _stream(self, replica: Replica) -> None:
        job, session, sink, choice = self._job, self._session, self._job.sink, self._choice
        order = session.generate_request(
            model=job.trace.model, replica_id=replica.replica_id, request_id=job.trace.request_id
        )
        job.trace.replica_ids.append(replica.replica_id)
        self._placement.in_flight[replica.replica_id] += 1
        events = self._agents.generate(replica, order, timeout_seconds=job.left_seconds())
        try:
            async with aclosing(events):
                async for event in events:
                    delta = session.feed(event)
                    if event.tokens and not self._has_first_token:
                        self._note_first_token()
                    if choice == 0 and event.HasField("timings"):
                        job.trace.worker = event.timings
                    await sink.delta(choice, delta)
                    if session.finish_reason is not None:
                        return
        finally:
            self._placement.leave(replica.replica_id)

    def _note_first_token(self) -> None:
        self._has_first_token = True
        model = self._job.trace.model
        metrics.WAITING.labels(model).dec()
        metrics.RUNNING.labels(model).inc()
        if self._job.trace.first_token_seconds is None:
            self._job.trace.first_token_seconds = self._job.age_seconds()


def _elsewhere(error: StokerError) -> bool:
    """Say whether another replica may do better: this one is gone, died, or its host cannot be reached."""
    return isinstance(error, ReplicaGone | WorkerDied) or type(error) is PeerError
