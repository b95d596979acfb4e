"""Going on with another gateway's request: what is found is used, what does not belong to it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.gateway.job import Job
from services.gateway.routing.routes import Replica
from services.gateway.sampling import SamplingRequest
from services.gateway.sessions.reattachment import Reattachment, first_epoch_of
from services.gateway.sessions.request_key import RequestKey, Seen, revision_tag
from services.gateway.sessions.session import Session
from services.gateway.text_request import Prompts, TextRequest
from services.gateway.trace import Trace
from stoker.clock import ManualClock
from stoker.errors import IdempotencyKeyReused, InvalidRequest, PeerError, StreamLost
from stoker.v1 import node_agent_pb2, session_pb2
from tests.integration.streams.client import Seen as Sink
from tests.unit.services.gateway.builders import ids_of, replica, route, session

KEY = RequestKey(name="key-a", fingerprint=b"f", seed=1)
HERE, THERE = replica("rep-1", agent_address="a:1"), replica("rep-2", agent_address="b:1")
ROUTE = route(replicas=(HERE, THERE))


class FakeAgents:
    """What agents say, by address; an error is raised."""

    def __init__(self, **said: Sequence[node_agent_pb2.KeptSession] | PeerError) -> None:
        self._said = {f"{name}:1": answer for name, answer in said.items()}

    async def find_sessions(
        self, address: str, session_ids: Sequence[str], *, timeout_seconds: float
    ) -> Sequence[node_agent_pb2.KeptSession]:
        """See `Agents`."""
        answer = self._said.get(address, ())
        if isinstance(answer, PeerError):
            raise answer
        return answer


def kept(text: str, **changed: object) -> node_agent_pb2.KeptSession:
    fields: dict[str, object] = {
        "session_id": "ses-1",
        "epoch": 3,
        "replica_id": "rep-2",
        "revision": "r1",
        "fingerprint": b"f",
        "tokens": [session_pb2.Token(id=token) for token in ids_of(text)],
    }
    return node_agent_pb2.KeptSession(**(fields | changed))  # type: ignore[arg-type]


async def restore(
    agents: FakeAgents, key: RequestKey = KEY, stream: Session | None = None, *, unix_seconds: float = 0
) -> tuple[Session, Sink, list[Replica]]:
    stream, sink = stream or session(max_tokens=50), Sink()
    request = TextRequest(
        request_id="r", model="tiny", content=Prompts(prompts=["x"]), sampling=SamplingRequest(), key=key
    )
    trace = Trace(
        request_id="r", model="tiny", kind="completion", started_seconds=0, unix_seconds=unix_seconds
    )
    job = Job(request=request, trace=trace, sink=sink, clock=ManualClock(), timeout_seconds=60)
    places = await Reattachment(agents).restore(job, key, [stream], ROUTE, HERE)  # type: ignore[arg-type]
    return stream, sink, places


async def test_the_longest_log_is_fed_and_its_replica_goes_on_under_the_next_epoch() -> None:
    agents = FakeAgents(a=[kept("ab", epoch=7, replica_id="rep-1")], b=[kept("abcd")])

    stream, sink, places = await restore(agents)

    assert (sink.text, stream.token_ids) == ("abcd", ids_of("abcd"))
    assert stream.epoch == 8
    assert stream.claim_epoch() == 9
    assert places == [THERE]


async def test_the_client_gets_only_what_it_has_not_seen() -> None:
    key = replace(KEY, revision_tag=revision_tag("r1"), seen=(Seen(tokens=3),))

    stream, sink, _ = await restore(FakeAgents(b=[kept("abcd")]), key)

    assert sink.text == "d"
    assert len(stream.token_ids) == 4


async def test_an_answer_that_had_ended_needs_no_replica_any_more() -> None:
    ended = kept("ab", finish_reason=session_pb2.FINISH_REASON_LENGTH)

    stream, sink, _ = await restore(FakeAgents(b=[ended]))

    assert (sink.text, sink.finish_reason, stream.finish_reason) == ("ab", "length", "length")


async def test_where_nothing_is_known_or_nobody_answers_the_request_begins_from_its_start() -> None:
    stream, sink, places = await restore(FakeAgents(a=PeerError("gone")))

    assert (stream.token_ids, stream.epoch, sink.text, places) == ([], 0, "", [HERE])


async def test_a_session_of_which_only_the_epoch_is_left_gets_a_higher_one() -> None:
    left = node_agent_pb2.KeptSession(session_id="ses-1", epoch=5)

    stream, _, places = await restore(FakeAgents(b=[left]))

    assert (stream.epoch, stream.token_ids, places) == (6, [], [HERE])


async def test_whoever_the_client_comes_to_later_is_above_all_that_an_earlier_gateway_will_claim() -> None:
    """Also where nothing is known of that one, which may only be paused."""
    earlier, _, _ = await restore(FakeAgents(), unix_seconds=1_800_000_000.0)
    later, _, _ = await restore(FakeAgents(a=PeerError("away")), unix_seconds=1_800_000_000.5)

    assert later.epoch > max(earlier.claim_epoch() for _ in range(1_000))
    assert later.epoch < 2**53  # whole in every reader of logs


async def test_an_epoch_that_is_found_counts_more_than_a_clock_that_is_late() -> None:
    found = first_epoch_of(1_800_000_000.0) + 3

    stream, _, _ = await restore(FakeAgents(b=[kept("ab", epoch=found)]), unix_seconds=1_799_999_000.0)

    assert stream.epoch == found + 1


async def test_tokens_of_other_weights_are_not_used() -> None:
    stream, _, _ = await restore(FakeAgents(b=[kept("ab", revision="r0")]))

    assert (stream.token_ids, stream.epoch) == ([], 4)


async def test_another_request_under_the_same_key_is_refused() -> None:
    with pytest.raises(IdempotencyKeyReused, match="new key"):
        await restore(FakeAgents(b=[kept("ab", fingerprint=b"other")]))


async def test_an_event_of_a_request_with_more_answers_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="2 answers"):
        await restore(FakeAgents(), replace(KEY, revision_tag=revision_tag("r1"), seen=(Seen(), Seen())))


async def test_the_rest_of_an_answer_of_weights_that_are_gone_is_lost() -> None:
    with pytest.raises(StreamLost, match="deployed anew"):
        await restore(FakeAgents(), replace(KEY, revision_tag=revision_tag("r0"), seen=(Seen(tokens=1),)))
