"""Keys and values of a moving session, brought to its destination round by round. A shell.

The destination's agent fetches them from the source's; nothing of them passes through here. Whatever fails
leaves the destination with tokens to compute, and the client with the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.job import Job
from services.gateway.routing.agents import Agents
from services.gateway.routing.routes import Replica
from services.gateway.sessions.move_rounds import SHIP_SECONDS, ship_within_seconds, ships_on
from services.gateway.sessions.session import Session
from stoker import log
from stoker.errors import StokerError
from stoker.v1.node_agent_pb2 import FetchKvRequest, FetchKvResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """Keys and values that are at a destination."""

    tokens: int = 0
    """Of how many tokens, from the session's first; 0 = it computes all of them."""
    data_bytes: int = 0
    rounds: int = 0
    why_not: str = ""
    """Code of the error for which nothing is there, or `switched_off`."""

    def with_round(self, came: FetchKvResponse) -> Shipped:
        """Return it after another round."""
        return Shipped(
            tokens=came.tokens, data_bytes=self.data_bytes + came.data_bytes, rounds=self.rounds + 1
        )


class KvRounds:
    """Ships one session's keys and values, for one move.

    Args:
        session: Read here, never changed.
        origin: Where it runs.
        job: Its job.
        agents: Node agents.
        ends_seconds: When its source ends, on the job's clock; None = it does not.
    """

    def __init__(
        self, session: Session, origin: Replica, job: Job, agents: Agents, ends_seconds: float | None
    ) -> None:
        self._session = session
        self._origin = origin
        self._job = job
        self._agents = agents
        self._ends_seconds = ends_seconds

    async def ship(self, destination: Replica) -> Shipped:
        """Have those of the tokens so far brought there, as far as that goes, while the source goes on."""
        shipped, missing = Shipped(), 0
        while True:
            earlier, missing = missing, self._session.token_count - shipped.tokens
            if not ships_on(number=shipped.rounds, missing=missing, earlier_missing=earlier):
                return shipped
            try:
                shipped = shipped.with_round(await self._fetch(destination, shipped))
            except StokerError as error:
                return self._not_shipped(destination, error)

    async def ship_last(
        self, destination: Replica, shipped: Shipped, *, hold_seconds: float
    ) -> tuple[Shipped, int]:
        """Have the last ones brought there in a moment in which the source stands still.

        Returns:
            What is there, and how many tokens the session has while it stands still; 0 = it goes on.
        """
        try:
            came = await self._fetch(destination, shipped, hold_seconds=hold_seconds)
        except StokerError as error:
            return self._not_shipped(destination, error), 0
        return shipped.with_round(came), came.held_tokens

    async def _fetch(
        self, destination: Replica, shipped: Shipped, *, hold_seconds: float = 0.0
    ) -> FetchKvResponse:
        session, job = self._session, self._job
        order = FetchKvRequest(
            session_id=session.session_id,
            replica_id=destination.replica_id,
            from_agent_address=self._origin.agent_address,
            from_replica_id=self._origin.replica_id,
            from_epoch=session.epoch,
            from_token=shipped.tokens,
            model=job.trace.model,
            within_seconds=ship_within_seconds(self._grace_left_seconds()),
            hold_seconds=hold_seconds,
        )
        return await self._agents.fetch_kv(
            destination, order, timeout_seconds=min(SHIP_SECONDS, job.left_seconds())
        )

    def _not_shipped(self, destination: Replica, error: StokerError) -> Shipped:
        log.get().info(
            "session.kv_not_shipped",
            session_id=self._session.session_id,
            to_replica_id=destination.replica_id,
            error_code=error.code,
            message=error.message,
        )
        return Shipped(why_not=error.code)

    def _grace_left_seconds(self) -> float | None:
        """Return how long the source still runs; None = it doesn't end."""
        if self._ends_seconds is None:
            return None
        return max(0.0, self._ends_seconds - self._job.clock.now_seconds())
