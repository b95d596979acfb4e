"""Going on with a request that another gateway began: find what its sessions have, and feed them with it.

Node agents keep the tokens of sessions with an idempotency key (their `kept_sessions.py`), also after the
gateway is gone, and go on making more for a while. All tokens follow from the key and the body, so nothing
here decides what the client gets: what isn't found is made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.gateway.job import Job
from services.gateway.routing.agents import Agents
from services.gateway.routing.routes import ModelRoute, Replica
from services.gateway.sessions.request_key import RequestKey, Seen, feed_unseen, revision_tag
from services.gateway.sessions.session import Session
from stoker import log
from stoker.errors import IdempotencyKeyReused, InvalidRequest, StokerError, StreamLost
from stoker.ids import ReplicaId
from stoker.v1 import node_agent_pb2, session_pb2

FIND_SECONDS = 2.0
"""How long an agent may take to say what it has; it is taken to have nothing then."""
MAX_ASKED_AGENTS = 256
EPOCHS_PER_MILLISECOND = 4096
"""More than a session has owners in that time; epochs stay below 2**53 until the year 2039."""


class Reattachment:
    """Finds sessions of earlier gateways.

    Args:
        agents: Node agents.
    """

    def __init__(self, agents: Agents) -> None:
        self._agents = agents

    async def restore(
        self, job: Job, key: RequestKey, sessions: Sequence[Session], route: ModelRoute, replica: Replica
    ) -> list[Replica]:
        """Feed sessions with the tokens they have already; return where each goes on.

        Args:
            job: Its sink gets what the client has not seen.
            key: Of the request.
            sessions: New ones, in order.
            route: Of the model, with its ready replicas.
            replica: Where those go that nothing is known of.

        Raises:
            IdempotencyKeyReused: The key began with another request.
            InvalidRequest: The last event is not of this request.
            StreamLost: What the client has was made by weights that are not served any more.
        """
        _check_seen(key, sessions, route)
        found = await self._find([session.session_id for session in sessions], route)
        if any(kept.fingerprint not in (b"", key.fingerprint) for kept in found):
            raise IdempotencyKeyReused(
                "this Idempotency-Key was used with another request; send a new key with a new request, or "
                "the same body with this one",
                param="idempotency-key",
            )
        at = {known.replica_id: known for known in route.replicas}
        first_epoch = first_epoch_of(job.trace.unix_seconds)
        places = []
        for choice, session in enumerate(sessions):
            mine = [kept for kept in found if kept.session_id == session.session_id]
            session.own_after(max([first_epoch - 1, *(kept.epoch for kept in mine)]))
            best = max(filter(lambda kept: _is_usable(kept, session, route), mine), key=_length, default=None)
            if best is not None and best.tokens:
                await self._feed(job, choice, session, best, _seen(key, choice))
            places.append(at.get(ReplicaId(best.replica_id), replica) if best is not None else replica)
        if found:
            log.get().info(
                "request.reattached",
                sessions=len(found),
                tokens=sum(len(session.token_ids) for session in sessions),
                seen_tokens=sum(seen.tokens for seen in key.seen),
            )
        return places

    async def _find(self, session_ids: Sequence[str], route: ModelRoute) -> list[node_agent_pb2.KeptSession]:
        """Ask every agent where the model is ready; one that does not answer has nothing."""

        async def ask(address: str) -> Sequence[node_agent_pb2.KeptSession]:
            try:
                return await self._agents.find_sessions(address, session_ids, timeout_seconds=FIND_SECONDS)
            except StokerError as error:
                log.get().info("agent.not_asked", address=address, message=error.message)
                return ()

        addresses = sorted({replica.agent_address for replica in route.replicas})[:MAX_ASKED_AGENTS]
        answers = await asyncio.gather(*(ask(address) for address in addresses))
        return [kept for answer in answers for kept in answer]

    async def _feed(
        self, job: Job, choice: int, session: Session, kept: node_agent_pb2.KeptSession, seen: Seen
    ) -> None:
        if job.trace.first_token_seconds is None:
            job.trace.first_token_seconds = job.age_seconds()
        event = session_pb2.GenerateEvent(
            epoch=session.epoch, tokens=kept.tokens, finish_reason=kept.finish_reason
        )
        delta = feed_unseen(session, event, seen)
        if delta.text or delta.tokens or delta.finish_reason:
            await job.sink.delta(choice, delta)


def first_epoch_of(unix_seconds: float) -> int:
    """Return the epoch that a session begins with at the gateway which its client came to at this time.

    It is above all that an earlier gateway will ever give it: one that was paused, or cut off, and then goes
    on where it was, is refused wherever it turns, also where nobody could tell this gateway about it. Clocks
    that differ only make it less sure; then the epochs that are found decide.
    """
    return int(unix_seconds * 1000) * EPOCHS_PER_MILLISECOND


def _check_seen(key: RequestKey, sessions: Sequence[Session], route: ModelRoute) -> None:
    if not key.seen:
        return
    if len(key.seen) != len(sessions):
        raise InvalidRequest(
            f"Last-Event-ID is of a request with {len(key.seen)} answers, this one has {len(sessions)}; "
            "send the request that the stream began with",
            param="last-event-id",
        )
    if key.revision_tag != revision_tag(route.revision):
        raise StreamLost(
            f"model {route.name!r} was deployed anew since this answer began, its earlier weights are gone; "
            "send the request again with a new key"
        )


def _seen(key: RequestKey, choice: int) -> Seen:
    return key.seen[choice] if key.seen else Seen()


def _is_usable(kept: node_agent_pb2.KeptSession, session: Session, route: ModelRoute) -> bool:
    """Say whether kept tokens are what the session needs: of these weights, scored if that was asked."""
    is_scored = kept.scored_from == 0 or not session.sampling.HasField("top_logprobs")
    return kept.revision == route.revision and is_scored


def _length(kept: node_agent_pb2.KeptSession) -> tuple[int, bool]:
    return len(kept.tokens), bool(kept.finish_reason)
