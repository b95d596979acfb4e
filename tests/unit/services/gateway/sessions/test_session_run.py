"""A session goes from replica to replica: who is asked, what is refused, what the client hears meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from prometheus_client import REGISTRY

from services.gateway.job import Job
from services.gateway.routing.placement import Placement
from services.gateway.routing.routes import Replica, RouteTable
from services.gateway.sampling import SamplingRequest
from services.gateway.sessions.hops import HopPolicy
from services.gateway.sessions.request_key import RequestKey
from services.gateway.sessions.session import Delta
from services.gateway.sessions.session_run import SessionRun
from services.gateway.sessions.waited import Waited
from services.gateway.text_request import Prompts, TextRequest, Waiting
from services.gateway.trace import Trace
from stoker.clock import ManualClock
from stoker.errors import (
    DeadlineExceeded,
    Fenced,
    KvUnavailable,
    LoadFailed,
    PeerError,
    QueueFull,
    StokerError,
    StreamLost,
    WorkerDied,
)
from stoker.v1 import controller_pb2, model_pb2, node_agent_pb2, session_pb2
from tests.unit.services.gateway.builders import event, ids_of, session

LENGTH = session_pb2.FINISH_REASON_LENGTH
TEXT = "abcdefgh"
Step = Any
"""What a played replica does: gives `n` tokens, raises an error, waits for an event, or sends one.
A fraction: so many seconds pass."""
STANDS_STILL: Step = object()
"""It does nothing more until its call is ended."""


class HastyClock(ManualClock):
    """Whoever sleeps wakes at once, that much later."""

    async def sleep(self, seconds: float) -> None:
        """See `Clock`."""
        self.advance(seconds)


class Seen:
    """The sink."""

    def __init__(self) -> None:
        self.text, self.news = "", []

    async def waiting(self, news: Waiting) -> None:
        """See `Sink`."""
        self.news.append(news.state)

    async def delta(self, choice: int, delta: Delta) -> None:
        """See `Sink`."""
        self.text += delta.text


class Played:
    """Replicas that play their scripts; stands where `Agents` does."""

    def __init__(self, scripts: Sequence[Sequence[Step]], clock: ManualClock) -> None:
        self._clock = clock
        self.orders: list[session_pb2.GenerateRequest] = []
        self.released: list[tuple[str, int]] = []
        self.open = 0
        self._scripts = list(scripts)

    async def generate(
        self, replica: Replica, order: session_pb2.GenerateRequest, *, timeout_seconds: float
    ) -> AsyncGenerator[session_pb2.GenerateEvent]:
        """Play the next script."""
        kept = session_pb2.GenerateRequest()
        kept.CopyFrom(order)
        self.orders.append(kept)
        ids, position = ids_of(TEXT), len(order.generated_token_ids)
        self.open += 1
        try:
            for step in self._scripts.pop(0):
                if isinstance(step, StokerError):
                    raise step
                if step is STANDS_STILL:
                    await asyncio.Event().wait()
                if isinstance(step, float):
                    self._clock.advance(step)
                    continue
                if isinstance(step, asyncio.Event):
                    await step.wait()
                    continue
                if not isinstance(step, int):
                    yield step
                    continue
                for _ in range(step):
                    last = position == len(ids) - 1
                    yield event(position, [ids[position]], epoch=order.epoch, finish=LENGTH if last else 0)
                    position += 1
        finally:
            self.open -= 1

    def release(self, replica: Replica, session_id: str, epoch: int) -> None:
        """Take note of who need not go on."""
        self.released.append((replica.replica_id, epoch))

    async def fetch_kv(
        self, destination: Replica, order: node_agent_pb2.FetchKvRequest, *, timeout_seconds: float
    ) -> node_agent_pb2.FetchKvResponse:
        """Ship nothing."""
        raise KvUnavailable("these replicas are played")

    async def hold(self, *_: object, **_options: object) -> int:
        """Hold nobody."""
        raise KvUnavailable("these replicas are played")


class World:
    """One session over played replicas."""

    def __init__(
        self,
        *scripts: Sequence[Step],
        routes: Sequence[dict[str, Any]] = ({}, {}, {}, {}),
        policy: HopPolicy | None = None,
        timeout_seconds: float = 600,
        acquire: Callable[..., Replica] | None = None,
        key: RequestKey | None = None,
    ) -> None:
        self.clock, self.seen = HastyClock(), Seen()
        self.agents = Played(scripts, self.clock)
        table = RouteTable()
        replicas = [
            controller_pb2.RouteReplica(**({"replica_id": f"rep-{number}", "max_batch": 4} | fields))
            for number, fields in enumerate(routes)
        ]
        spec = model_pb2.ModelSpec(name="tiny", checkpoint_uri="/m")
        table.apply(
            controller_pb2.RoutesUpdate(
                snapshot=True,
                routes=[controller_pb2.Route(model=model_pb2.Model(spec=spec), replicas=replicas)],
            )
        )
        self.trace = Trace(
            request_id="r",
            model="tiny",
            kind="chat",
            started_seconds=self.clock.now_seconds(),
            unix_seconds=0,
        )
        request = TextRequest(
            request_id="r",
            model="tiny",
            content=Prompts(prompts=["x"]),
            sampling=SamplingRequest(),
            key=key,
        )
        job = Job(
            request=request,
            trace=self.trace,
            sink=self.seen,
            clock=self.clock,
            timeout_seconds=timeout_seconds,
        )
        self.placement = _Placement(table, self.clock, acquire)
        self.session = session(keep_seconds=60.0 if key else 0.0)
        self._run = SessionRun(self.session, 0, job, self.placement, self.agents, policy or HopPolicy())
        self._first = table.find("tiny").replicas[0]

    async def run(self) -> None:
        """Run the session to its end."""
        await self._run.run(self._first)


class _Placement(Placement):
    """The gateway's placement, with a controller that answers at once or not at all."""

    def __init__(self, table: RouteTable, clock: ManualClock, acquire: Callable[..., Replica] | None) -> None:
        super().__init__(table, None, clock=clock, cold_timeout_seconds=9, patience_seconds=9)  # type: ignore[arg-type]
        self._answer = acquire
        self.acquired: list[Sequence[str]] = []
        self.waited: list[Waited | None] = []

    async def acquire(
        self,
        job: Job,
        *,
        failed: Sequence[str] = (),
        limit_seconds: float = 0,
        waited: Waited | None = None,
    ) -> Replica:
        self.acquired.append(failed)
        self.waited.append(waited)
        if self._answer is None:
            raise PeerError("no controller answers")
        return self._answer()


async def test_the_next_replica_gets_the_whole_log_under_the_next_epoch() -> None:
    world = World([3, WorkerDied("x")], [2, PeerError("x")], [3])

    await world.run()

    assert world.seen.text == TEXT
    assert [order.replica_id for order in world.agents.orders] == ["rep-0", "rep-1", "rep-2"]
    assert [order.epoch for order in world.agents.orders] == [0, 1, 2]
    assert [list(order.generated_token_ids) for order in world.agents.orders] == [
        [],
        ids_of("abc"),
        ids_of("abcde"),
    ]
    assert (world.trace.hops, world.trace.resumed_tokens) == (2, 8)


async def test_a_replica_is_told_how_long_its_session_has_waited_in_all() -> None:
    world = World([4.0, WorkerDied("queue")], [2.0, 3, 5.0, WorkerDied("x")], [1.0, WorkerDied("y")], [5])

    world.clock.advance(10.0)  # the model was cold
    await world.run()

    told = [order.waited_seconds for order in world.agents.orders]
    assert told == [10.0, 14.0, 16.0, 17.0]  # and none of the 5 s in which it was served


async def test_who_goes_on_elsewhere_asks_for_a_replica_with_all_its_waits() -> None:
    found = Replica(replica_id="rep-9", node_id="n", agent_address="a", max_context_tokens=9, max_batch=1)
    world = World([2.0, 3, 5.0, WorkerDied("x")], [5], routes=[{}], acquire=lambda: found)

    await world.run()

    (waited,) = world.placement.waited
    assert waited is not None
    assert waited.earlier_seconds == 2.0
    assert waited.seconds(world.clock.now_seconds()) == 2.0  # interrupted just now


async def test_tokens_of_an_earlier_owner_are_refused() -> None:
    zombie = event(3, ids_of("ZZZ"), epoch=0)
    world = World([3, WorkerDied("x")], [zombie, 2, zombie, 3])

    await world.run()

    assert world.seen.text == TEXT


KEY = RequestKey(name="key-1", fingerprint=b"f", seed=1)


def late(highest_epoch: int) -> Fenced:
    return Fenced("it has had a later owner here", details={"highest_epoch": highest_epoch})


async def test_a_session_with_a_key_is_owned_after_owners_that_were_not_found() -> None:
    world = World([late(4)], [late(6)], [8], key=KEY)

    await world.run()

    assert world.seen.text == TEXT
    assert [(order.replica_id, order.epoch) for order in world.agents.orders] == [
        ("rep-0", 0),
        ("rep-0", 5),
        ("rep-0", 7),
    ]


async def test_a_session_without_a_key_takes_nothing_over() -> None:
    world = World([late(4)], [8])

    with pytest.raises(Fenced):
        await world.run()


async def test_a_session_that_somebody_took_over_is_not_taken_back() -> None:
    """As by a gateway that was away: its client is another one's by now."""
    world = World([3, WorkerDied("x")], [late(9)], [8], key=KEY)

    with pytest.raises(Fenced):
        await world.run()
    taken = World([Fenced("taken over by epoch 9")], [8], key=KEY)
    with pytest.raises(Fenced, match="taken over"):
        await taken.run()


async def test_owners_without_end_are_not_followed_without_end() -> None:
    world = World(*([late(number)] for number in range(1, 20)), key=KEY)

    with pytest.raises(Fenced):
        await world.run()
    assert len(world.agents.orders) == 9


async def test_the_start_that_ended_with_the_first_token_is_in_the_requests_trace() -> None:
    first = event(0, ids_of("a"))
    first.timings.prefill_seconds = 0.25
    first.timings.start.weights_seconds = 0.5
    world = World([first, event(1, ids_of(TEXT)[1:], finish=LENGTH)])

    await world.run()

    shown = world.trace.to_json()
    assert shown["start"]["weights_seconds"] == 0.5
    assert shown["worker"]["prefill_seconds"] == 0.25
    assert "start" not in shown["worker"]


async def test_a_replica_that_leaves_a_gap_or_repeats_a_token_is_given_up() -> None:
    world = World([2, event(4, ids_of("x"))], [2, event(1, ids_of("b"), epoch=1)], [4])

    await world.run()

    assert world.seen.text == TEXT


async def test_replicas_with_equal_numerics_are_preferred_and_other_weights_refused() -> None:
    routes = [
        {"numerics": "a", "revision": "r1"},
        {"numerics": "b", "revision": "r1"},
        {"numerics": "a", "revision": "r2"},
        {"numerics": "a", "revision": "r1"},
    ]
    world = World([3, WorkerDied("x")], [2, WorkerDied("x")], [3], routes=routes)

    await world.run()

    assert [order.replica_id for order in world.agents.orders] == ["rep-0", "rep-3", "rep-1"]


async def test_a_stream_whose_weights_were_replaced_ends_with_a_clear_error() -> None:
    other = Replica(
        replica_id="rep-9", node_id="n", agent_address="a", max_context_tokens=9, max_batch=1, revision="r2"
    )
    world = World([3, WorkerDied("x")], routes=[{"revision": "r1"}], acquire=lambda: other)

    with pytest.raises(StreamLost, match="deployed anew"):
        await world.run()

    assert world.seen.text == "abc"


async def test_a_stream_waits_for_a_replica_and_tells_the_client() -> None:
    tries = iter([LoadFailed("store away", retry_after_seconds=1), PeerError("no controller"), None])
    found = Replica(replica_id="rep-9", node_id="n", agent_address="a", max_context_tokens=9, max_batch=1)

    def answer() -> Replica:
        error = next(tries)
        if error is not None:
            raise error
        return found

    world = World([3, WorkerDied("x")], [5], routes=[{}], acquire=answer)

    await world.run()

    assert world.seen.text == TEXT
    assert world.seen.news == ["resuming", "resuming"]
    assert world.placement.acquired == [("rep-0",)] * 3


async def test_a_stream_nobody_can_go_on_with_ends_once_with_what_to_do() -> None:
    world = World([3, WorkerDied("x")], routes=[{}], policy=HopPolicy(resume_timeout_seconds=5))

    with pytest.raises(StreamLost, match=r"after 3 tokens: no replica .* within 5 s .*again"):
        await world.run()


async def test_the_requests_own_deadline_ends_the_search() -> None:
    world = World([3, WorkerDied("x")], routes=[{}], timeout_seconds=2)

    with pytest.raises(DeadlineExceeded, match="longer than 2 s"):
        await world.run()


async def test_a_full_replica_is_not_taken_for_a_failed_one() -> None:
    world = World([3, WorkerDied("x")], [QueueFull("full")], [5], routes=[{}, {}])

    await world.run()

    assert [order.replica_id for order in world.agents.orders] == ["rep-0", "rep-1", "rep-1"]


async def test_a_request_without_a_token_is_tried_elsewhere_and_then_refused_with_the_last_error() -> None:
    world = World([WorkerDied("one")], [WorkerDied("two")], policy=HopPolicy(max_attempts=2))

    with pytest.raises(WorkerDied, match="two"):
        await world.run()


async def test_no_replica_is_counted_busy_by_a_session_that_left_it() -> None:
    world = World([3, WorkerDied("x")], [5])

    await world.run()

    assert world.placement.in_flight == {}


async def test_a_stream_that_goes_on_with_other_numerics_is_counted() -> None:
    before = numerics_changes()
    routes = [{"numerics": "a"}, {"numerics": "b"}, {"numerics": "b"}, {}]
    world = World([3, WorkerDied("x")], [2, WorkerDied("x")], [1, WorkerDied("x")], [3], routes=routes)

    await world.run()

    assert [order.replica_id for order in world.agents.orders] == ["rep-0", "rep-1", "rep-2", "rep-3"]
    assert numerics_changes() - before == 1  # a to b; b to b is equal, and what is not known counts as equal


@pytest.mark.parametrize(("destination", "counted"), [("b", 1), ("a", 0), ("", 0)])
async def test_a_stream_that_moves_to_other_numerics_is_counted_once(destination: str, counted: int) -> None:
    before, resumed = numerics_changes("move"), numerics_changes("resume")
    asks = session_pb2.GenerateEvent(leave=session_pb2.Leave(to_replica_id="rep-1", reason="drain"))
    routes = [{"numerics": "a"}, {"numerics": destination}]
    world = World([3, asks, STANDS_STILL], [5], routes=routes)

    await world.run()

    assert world.seen.text == TEXT
    assert (world.trace.moves, world.trace.hops) == (1, 0)
    assert numerics_changes("move") - before == counted
    assert numerics_changes("resume") == resumed


LEAVES = session_pb2.GenerateEvent(leave=session_pb2.Leave(to_replica_id="rep-1", reason="drain"))


async def test_a_session_with_a_key_that_has_moved_is_not_run_on_where_it_came_from() -> None:
    """It would be, for a client that might come back: nobody comes back there."""
    world = World([3, LEAVES, STANDS_STILL], [5], key=KEY)

    await world.run()

    assert world.seen.text == TEXT
    assert world.agents.released == [("rep-0", 0)]


async def test_a_destination_that_is_not_needed_any_more_does_not_run_on() -> None:
    """The answer ends at its source while the destination still computes."""
    begun = asyncio.Event()
    world = World([3, LEAVES, begun, 5], [_Sets(begun), STANDS_STILL], key=KEY)

    await world.run()

    assert world.seen.text == TEXT
    assert world.trace.moves == 0
    assert world.agents.released == [("rep-1", 1)]
    assert world.agents.open == 0


class _Sets(asyncio.Event):
    """A step that sets another one's event and does not wait."""

    def __init__(self, other: asyncio.Event) -> None:
        super().__init__()
        self._other = other

    async def wait(self) -> bool:  # type: ignore[override]  # always true here
        """Let the other one go on."""
        self._other.set()
        return True


async def test_a_client_that_leaves_at_any_moment_of_a_move_leaves_no_call_open() -> None:
    for turns in range(40):
        world = World([3, LEAVES, STANDS_STILL], [5])
        running = asyncio.ensure_future(world.run())
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait({running})

        assert world.agents.open == 0, f"after {turns} turns"
        assert world.placement.in_flight == {}


def numerics_changes(way: str = "resume") -> float:
    """Return how many streams have been counted."""
    labels = {"model_name": "tiny", "way": way}
    return REGISTRY.get_sample_value("stoker_gateway_numerics_changes_total", labels) or 0.0
