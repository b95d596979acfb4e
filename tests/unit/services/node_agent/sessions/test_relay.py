"""The relay of a worker's sessions, over a worker that is played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.node_agent.sessions import relay as relay_module
from services.node_agent.sessions.relay import RelayedSession, SessionRelay
from stoker.errors import CapacityError, Fenced, PeerError, QueueFull, StokerError, WorkerDied
from stoker.v1.session_pb2 import FINISH_REASON_LENGTH, GenerateEvent, GenerateRequest, Token
from stoker.v1.worker_pb2 import LoadEnd, RunCommand, SessionError, SessionEvent, StepEvent


class PlayedCall:
    """Stands for the streaming call of a stub: can be read, and cancelled."""

    def __init__(self, steps: AsyncIterator[StepEvent]) -> None:
        self._steps = steps
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[StepEvent]:
        return self._steps

    def cancel(self) -> bool:
        """Note it, as a call would that has not ended."""
        self.cancelled = True
        return True


class PlayedWorker:
    """Stands for the stub of a worker: keeps the commands, says what the test tells it to."""

    def __init__(self) -> None:
        self.commands: asyncio.Queue[RunCommand] = asyncio.Queue()
        self.steps: asyncio.Queue[StepEvent | None] = asyncio.Queue()

    def Run(self, commands: AsyncIterator[RunCommand]) -> PlayedCall:  # noqa: N802 - the name of the rpc
        """Play the rpc."""
        return PlayedCall(self._play(commands))

    async def _play(self, commands: AsyncIterator[RunCommand]) -> AsyncIterator[StepEvent]:
        async def listen() -> None:
            async for command in commands:
                self.commands.put_nowait(command)

        listening = asyncio.create_task(listen())
        try:
            while (step := await self.steps.get()) is not None:
                yield step
        finally:
            listening.cancel()

    def say(self, session_id: str, *, position: int = 0, epoch: int = 1, finish: bool = False) -> None:
        """Generate a token."""
        event = GenerateEvent(epoch=epoch, position=position, tokens=[Token(id=position)])
        if finish:
            event.finish_reason = FINISH_REASON_LENGTH
        self.steps.put_nowait(StepEvent(sessions=[SessionEvent(session_id=session_id, event=event)]))


class Scene:
    """A relay, its worker and a clock."""

    def __init__(self, max_sessions: int = 8) -> None:
        self.now = 50.0
        self.changes = 0
        self.load_ends: list[LoadEnd] = []
        self.worker = PlayedWorker()
        self.relay = SessionRelay(
            self.worker,  # type: ignore[arg-type]
            peer="worker w-1",
            max_sessions=max_sessions,
            on_change=self._count,
            now_seconds=lambda: self.now,
            on_load_end=self.load_ends.append,
        )

    def _count(self) -> None:
        self.changes += 1

    def open(self, session_id: str = "ses-1", epoch: int = 1, waited_seconds: float = 0.0) -> RelayedSession:
        """Open a session."""
        return self.relay.open(
            GenerateRequest(
                session_id=session_id, epoch=epoch, replica_id="rep-1", waited_seconds=waited_seconds
            )
        )


@asynccontextmanager
async def scene(max_sessions: int = 8) -> AsyncIterator[Scene]:
    """Run a relay for the length of a test."""
    made = Scene(max_sessions)
    running = asyncio.create_task(made.relay.run())
    try:
        yield made
    finally:
        made.worker.steps.put_nowait(None)
        await running


async def test_each_session_gets_its_own_events_as_they_were_sent() -> None:
    async with scene() as played:
        first, second = played.open("ses-1"), played.open("ses-2")
        played.worker.say("ses-2", position=7)
        played.worker.say("ses-1", position=3)

        assert (await first.next()).position == 3
        assert (await second.next()).position == 7


async def test_a_session_waits_until_its_first_event_and_then_runs() -> None:
    async with scene() as played:
        session = played.open()
        assert (played.relay.session_count, played.relay.running_count) == (1, 0)
        played.worker.say("ses-1")
        await session.next()

        assert (played.relay.session_count, played.relay.running_count) == (1, 1)


async def test_the_longest_wait_is_what_gateways_said_and_what_was_waited_here() -> None:
    async with scene() as played:
        assert played.relay.longest_wait_seconds() is None
        session = played.open("ses-1", waited_seconds=30.0)
        played.now += 2.0
        played.open("ses-2", waited_seconds=1.0)
        played.now += 3.0
        assert played.relay.longest_wait_seconds() == 35.0
        played.worker.say("ses-1")
        await session.next()

        assert played.relay.longest_wait_seconds() == 4.0


async def test_who_is_taken_over_in_the_queue_goes_on_waiting() -> None:
    async with scene() as played:
        played.open(epoch=1, waited_seconds=30.0)
        played.now += 2.0
        played.open(epoch=2)  # of a gateway that knows nothing of the one before

        assert played.relay.longest_wait_seconds() == 32.0


@pytest.mark.parametrize("said", [-5.0, float("nan")])
async def test_a_wait_that_cannot_be_counts_as_none(said: float) -> None:
    async with scene() as played:
        played.open(waited_seconds=said)

        assert played.relay.longest_wait_seconds() == 0.0


async def test_a_finished_session_is_not_cancelled_in_the_worker() -> None:
    async with scene() as played:
        session = played.open()
        played.worker.say("ses-1", finish=True)
        await session.next()
        played.relay.close(session)
        played.open("ses-2")
        kinds = [(await played.worker.commands.get()).WhichOneof("command") for _ in range(2)]

        assert kinds == ["submit", "submit"]


async def test_a_session_whose_caller_left_is_cancelled_in_the_worker() -> None:
    async with scene() as played:
        played.relay.close(played.open())
        submit, cancel = await played.worker.commands.get(), await played.worker.commands.get()

        assert submit.submit.session_id == cancel.cancel.session_id == "ses-1"
        assert played.relay.session_count == 0


async def test_the_replica_is_idle_since_its_last_session_ended() -> None:
    async with scene() as played:
        session = played.open()
        played.now = 60.0
        assert played.relay.idle_seconds() == 0.0
        played.relay.close(session)
        played.now = 64.0

        assert played.relay.idle_seconds() == 4.0


async def test_an_error_of_the_worker_is_raised_after_the_events_before_it() -> None:
    async with scene() as played:
        session = played.open()
        played.worker.say("ses-1")
        error = SessionError(code="worker_died", message="out of memory")
        played.worker.steps.put_nowait(
            StepEvent(sessions=[SessionEvent(session_id="ses-1", epoch=1, error=error)])
        )

        assert (await session.next()).position == 0
        with pytest.raises(WorkerDied, match="out of memory"):
            await session.next()


async def test_an_error_of_an_earlier_owners_request_that_comes_late_ends_nobody_elses_session() -> None:
    async with scene() as played:
        played.open(epoch=1)
        present = played.open(epoch=2)
        error = SessionError(code="queue_full", message="no room for epoch 1")
        played.worker.steps.put_nowait(
            StepEvent(sessions=[SessionEvent(session_id="ses-1", epoch=1, error=error)])
        )
        played.worker.say("ses-1", epoch=2, position=4)

        assert (await present.next()).position == 4
        assert played.relay.session_count == 1


async def test_when_the_worker_dies_every_session_ends_and_none_is_opened() -> None:
    async with scene() as played:
        session = played.open()
        played.relay.fail_all(WorkerDied("killed"))

        with pytest.raises(WorkerDied):
            await session.next()
        with pytest.raises(WorkerDied):
            played.open("ses-2")


async def test_more_sessions_than_the_maximum_are_refused() -> None:
    async with scene(max_sessions=1) as played:
        played.open("ses-1")

        with pytest.raises(QueueFull):
            played.open("ses-2")


async def test_a_later_epoch_takes_a_session_over_and_an_earlier_one_does_not() -> None:
    async with scene() as played:
        old = played.open(epoch=2)
        with pytest.raises(Fenced):
            played.open(epoch=1)
        new = played.open(epoch=3)
        played.worker.say("ses-1", epoch=2, position=1)
        played.worker.say("ses-1", epoch=3, position=5)

        with pytest.raises(Fenced):
            await old.next()
        assert (await new.next()).position == 5


async def test_a_client_that_reads_too_slowly_loses_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "MAX_BUFFERED_EVENTS", 2)
    async with scene() as played:
        session = played.open()
        for position in range(3):
            played.worker.say("ses-1", position=position)
        read: list[int] = []
        with pytest.raises(CapacityError, match="lags"):
            await read_all(session, read)

        assert read == [0, 1]


async def read_all(session: RelayedSession, into: list[int]) -> None:
    """Read until the session ends, once it has."""
    while played_error(session) is None:  # noqa: ASYNC110 - the relay has no event for the test to await
        await asyncio.sleep(0)
    while True:
        into.append((await session.next()).position)


def played_error(session: RelayedSession) -> StokerError | None:
    """Return how the session ended, if it has."""
    return session._error


async def test_the_end_of_a_load_is_known_before_the_tokens_it_came_with() -> None:
    async with scene() as played:
        session = played.open()
        step = StepEvent(load_end=LoadEnd(error_code="x"))
        token = GenerateEvent(epoch=1, tokens=[Token(id=1)])
        step.sessions.append(SessionEvent(session_id="ses-1", event=token))
        played.worker.steps.put_nowait(step)
        await session.next()

        assert [end.error_code for end in played.load_ends] == ["x"]


async def test_a_session_that_is_taken_over_is_not_cancelled_in_the_worker() -> None:
    async with scene() as played:
        played.open(epoch=1)
        played.open(epoch=2)
        commands = [await played.worker.commands.get() for _ in range(2)]

        assert [command.submit.epoch for command in commands] == [1, 2]


async def test_an_owner_that_a_later_one_elsewhere_has_followed_is_cut() -> None:
    async with scene() as played:
        session = played.open(epoch=2)
        played.relay.cut("ses-1", below_epoch=2)
        assert played.relay.session_count == 1

        played.relay.cut("ses-1", below_epoch=3)
        played.relay.cut("unknown", below_epoch=3)

        with pytest.raises(Fenced, match="epoch 3"):
            await session.next()
        assert played.relay.session_count == 0


async def test_who_reads_a_session_is_asked_to_move_it() -> None:
    async with scene() as played:
        session = played.open(epoch=4)
        played.relay.ask_to_leave("drained", 9.0)
        event = await session.next()

        assert (event.epoch, event.leave.reason, event.leave.grace_seconds) == (4, "drained", 9.0)
        assert not event.tokens


def asked(sessions: list[RelayedSession]) -> list[str]:
    """Return which sessions have been asked to leave since the last call."""
    found = []
    for session in sessions:
        while (event := session.poll()) is not None:
            assert event.HasField("leave")
            found.append(session.session_id)
    return found


async def test_an_order_that_is_repeated_soon_asks_nobody_else() -> None:
    async with scene() as played:
        sessions = [played.open(f"ses-{number}") for number in range(3)]
        played.relay.ask_to_leave("crowded", 0.0, max_sessions=1)
        first = asked(sessions)
        played.now += relay_module.LEAVING_SECONDS / 2
        played.relay.ask_to_leave("crowded", 0.0, max_sessions=1)

        assert asked(sessions) == first


async def test_a_session_that_could_not_move_is_asked_again_only_after_all_others() -> None:
    async with scene() as played:
        sessions = [played.open(f"ses-{number}") for number in range(3)]
        orders = []
        for _ in range(5):
            played.relay.ask_to_leave("crowded", 0.0, max_sessions=1)
            orders += asked(sessions)
            played.now += relay_module.LEAVING_SECONDS

        assert orders == ["ses-0", "ses-1", "ses-2", "ses-0", "ses-1"]


class PlayedLink:
    """Keeps what was sent over it."""

    def __init__(self) -> None:
        self.commands: list[RunCommand] = []

    def send(self, body: bytes) -> None:
        """Take a message."""
        self.commands.append(RunCommand.FromString(body))


async def test_over_a_link_commands_go_out_and_tokens_come_in_and_the_call_carries_nothing() -> None:
    async with scene() as played:
        link = PlayedLink()
        played.relay.use(link)
        session = played.open()
        event = GenerateEvent(epoch=1, position=3, tokens=[Token(id=3)])
        step = StepEvent(sessions=[SessionEvent(session_id="ses-1", event=event)])
        played.relay.take_frame(step.SerializeToString())
        came = await session.next()
        played.relay.close(session)

        assert came == event
        assert [command.WhichOneof("command") for command in link.commands] == ["submit", "cancel"]
        assert played.worker.commands.empty()


async def test_a_link_that_ends_is_a_worker_that_cannot_be_reached() -> None:
    made = Scene()
    running = asyncio.create_task(made.relay.run())
    await asyncio.sleep(0)
    made.relay.lose("it closed the connection")

    with pytest.raises(PeerError, match=r"worker w-1 cannot be reached: it closed"):
        await running


async def test_a_frame_that_is_no_step_is_refused() -> None:
    with pytest.raises(PeerError, match="no step"):
        Scene().relay.take_frame(b"\xff\xff\xff")
