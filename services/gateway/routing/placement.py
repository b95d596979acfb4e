"""Placement, seen from the gateway: find a replica for a request, or have one started and wait. A shell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing

from services.gateway.job import Job
from services.gateway.routing.controllers import ControllerAway, Controllers
from services.gateway.routing.routes import ModelRoute, Replica, RouteTable, choose_replica
from services.gateway.sessions.waited import Waited
from services.gateway.text_request import Waiting
from stoker.clock import Clock
from stoker.errors import PeerError
from stoker.ids import ReplicaId
from stoker.v1 import controller_pb2

AWAY_RETRY_SECONDS = 0.25
"""Between two tries while no controller can be reached."""


class Placement:
    """Finds replicas.

    Args:
        table: The routes.
        controllers: Who starts replicas.
        clock: Time.
        cold_timeout_seconds: Longest wait for a start.
        patience_seconds: How long to keep asking while no controller can be reached or none leads: longer
            than a leader's lease, so that its death loses no request.

    Attributes:
        table: The routes.
        in_flight: Sessions this gateway runs on each replica; `leave` takes one off.
    """

    def __init__(
        self,
        table: RouteTable,
        controllers: Controllers,
        *,
        clock: Clock,
        cold_timeout_seconds: float,
        patience_seconds: float,
    ) -> None:
        self.in_flight: Counter[ReplicaId] = Counter()
        self.table = table
        self._controllers = controllers
        self._clock = clock
        self._cold_timeout_seconds = cold_timeout_seconds
        self._patience_seconds = patience_seconds

    def ready(
        self, route: ModelRoute, failed: Sequence[ReplicaId] = (), like: Replica | None = None
    ) -> Replica | None:
        """Return the ready replica with the most room; None when the model is cold.

        Args:
            route: The model's.
            failed: Replicas that just failed.
            like: Where the session began, if it goes on.
        """
        shunned = self.table.shunned(now_seconds=self._clock.now_seconds())
        return choose_replica(route.replicas, self.in_flight, excluded=shunned.union(failed), like=like)

    def named(self, model: str, replica_id: ReplicaId) -> Replica | None:
        """Return a ready replica of a model by its id; None while the routes have none of that name."""
        if model not in self.table:
            return None
        replicas = self.table.find(model).replicas
        return next((replica for replica in replicas if replica.replica_id == replica_id), None)

    def report_failed(self, replica: Replica) -> None:
        """Pass over a replica for a while."""
        self.table.shun(replica.replica_id, now_seconds=self._clock.now_seconds())

    def leave(self, replica_id: ReplicaId) -> None:
        """Count a session less on a replica."""
        self.in_flight[replica_id] -= 1
        if not self.in_flight[replica_id]:
            del self.in_flight[replica_id]

    async def acquire(
        self,
        job: Job,
        *,
        failed: Sequence[ReplicaId] = (),
        limit_seconds: float = math.inf,
        waited: Waited | None = None,
    ) -> Replica:
        """Have a replica started unless one is, tell the client how it goes, and return it when it is ready.

        Leaving early (cancellation) ends the wait, never the start.

        Args:
            job: The request; its trace is told the start's timings.
            failed: Replicas that just failed under this request.
            limit_seconds: Longest wait, if shorter than what the settings and the request allow.
            waited: By the session that goes on; None = since the request came.

        Raises:
            StokerError: What the controller says: no room, load failed, not in time, nobody there.
        """
        began_seconds = self._clock.now_seconds()
        waited = waited or Waited(since_seconds=job.trace.started_seconds)
        timeout_seconds = min(self._cold_timeout_seconds, job.left_seconds(), limit_seconds)
        away_since_seconds: float | None = None
        if failed or job.request.deadline_seconds is None:  # else a refusal at once must still be an error
            await job.sink.waiting(Waiting(state="acquiring"))
        try:
            while True:
                now_seconds = self._clock.now_seconds()
                left_seconds = timeout_seconds - (now_seconds - began_seconds)
                request = controller_pb2.AcquireRequest(
                    model=job.trace.model,
                    request_id=job.trace.request_id,
                    timeout_seconds=max(0.001, left_seconds),
                    failed_replica_ids=failed,
                    deadline_seconds=0.0 if failed else job.deadline_left_seconds(),
                    waited_seconds=waited.seconds(now_seconds),
                    earlier_waits_seconds=waited.earlier_seconds,
                )
                try:
                    return await self._acquire_once(request, job)
                except ControllerAway as error:
                    now_seconds = self._clock.now_seconds()
                    if away_since_seconds is None or error.begun:
                        away_since_seconds = now_seconds
                    is_patient = now_seconds - away_since_seconds < self._patience_seconds
                    if not is_patient or now_seconds - began_seconds >= timeout_seconds:
                        raise
                    await job.sink.waiting(Waiting(state="acquiring", reason=error.message))
                    await self._clock.sleep(AWAY_RETRY_SECONDS)
        finally:
            job.trace.acquire_seconds += self._clock.now_seconds() - began_seconds

    async def start_another(self, job: Job, *, waited_seconds: float = 0.0) -> Replica:
        """Return a replica for a session that runs well but must move; the client is told nothing.

        Args:
            job: Its request.
            waited_seconds: How long it has waited for its first token, where that has not come.

        Raises:
            StokerError: What the controller says.
        """
        request = controller_pb2.AcquireRequest(
            model=job.trace.model,
            request_id=job.trace.request_id,
            timeout_seconds=min(self._cold_timeout_seconds, job.left_seconds()),
            waited_seconds=waited_seconds,
        )
        events = self._controllers.stream(
            lambda stub: stub.Acquire(request, timeout=request.timeout_seconds + 1.0)
        )
        async with aclosing(events):
            async for event in events:
                if event.WhichOneof("event") == "ready":
                    return Replica.from_proto(event.ready.replica)
        raise PeerError(f"the controller stopped waiting for model {job.trace.model!r} without a word")

    async def _acquire_once(self, request: controller_pb2.AcquireRequest, job: Job) -> Replica:
        events = self._controllers.stream(
            lambda stub: stub.Acquire(request, timeout=request.timeout_seconds + 1.0)
        )
        async with aclosing(events):
            async for event in events:
                match event.WhichOneof("event"):
                    case "ready":
                        if event.ready.HasField("timings"):
                            job.trace.start = event.ready.timings
                        return Replica.from_proto(event.ready.replica)
                    case "queued":
                        await job.sink.waiting(Waiting(state="queued", reason=event.queued.reason))
                    case "starting":
                        await job.sink.waiting(_starting(event.starting))
        raise ControllerAway(
            f"the controller stopped waiting for model {job.trace.model!r} without a word; try again",
            retry_after_seconds=1.0,
            begun=True,
        )


def _starting(starting: controller_pb2.AcquireStarting) -> Waiting:
    return Waiting(
        state="starting",
        replica_id=starting.replica_id,
        node_id=starting.node_id,
        elapsed_seconds=starting.elapsed_seconds,
        predicted_seconds=starting.predicted_seconds,
        loaded_fraction=starting.loaded_fraction,
    )
