"""The worker's one stream of sessions, with an engine that is played by the test."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import pytest

from services.worker.engine.protocol import Finished, FinishReason, SessionTimings, Submit, TokenOut
from services.worker.run_stream import RunStream
from stoker.errors import AlreadyExists, CheckpointInvalid, QueueFull, WorkerDied
from stoker.ids import SessionId
from stoker.v1.model_pb2 import AdapterSpec
from stoker.v1.session_pb2 import GenerateRequest, Sampling
from stoker.v1.start_pb2 import StartTimings
from stoker.v1.worker_pb2 import CancelSession, LoadEnd, RunCommand, SessionEvent, StepEvent


class PlayedEngine:
    """Keeps what it was asked."""

    def __init__(self) -> None:
        self.submitted: list[SessionId] = []
        self.adapters: list[object] = []
        self.cancelled: list[SessionId] = []
        self.is_full = False

    def submit(self, request: Submit) -> None:
        """Take a session."""
        if self.is_full:
            raise QueueFull("no room")
        self.submitted.append(request.session_id)
        self.adapters.append(request.adapter)

    def cancel(self, session_id: SessionId) -> None:
        """End a session."""
        self.cancelled.append(session_id)


class PlayedAdapters:
    """Adapters that come when the test says so."""

    def __init__(self) -> None:
        self.coming: Future[object] = Future()
        self.leases = 0

    def lease(self, wanted: AdapterSpec) -> Future[object]:
        """Promise the adapter."""
        del wanted
        self.leases += 1
        return self.coming

    def release(self, wanted: AdapterSpec) -> None:
        """Take a lease back."""
        del wanted
        self.leases -= 1


class Scene:
    """A stream, its engine and its reader."""

    def __init__(self) -> None:
        self.engine = PlayedEngine()
        self.stream = RunStream(asyncio.get_running_loop())
        self._events = self.stream.events()

    def submit(
        self, session_id: str = "ses-1", *, epoch: int = 1, max_tokens: int = 4, adapter: str = ""
    ) -> None:
        """Send a session."""
        request = GenerateRequest(
            session_id=session_id,
            epoch=epoch,
            prompt_token_ids=[1],
            sampling=Sampling(max_tokens=max_tokens),
            adapter=AdapterSpec(name=adapter) if adapter else None,
        )
        self.stream.take(RunCommand(submit=request), self.engine)  # type: ignore[arg-type]

    def cancel(self, session_id: str = "ses-1") -> None:
        """Cancel a session."""
        command = RunCommand(cancel=CancelSession(session_id=session_id))
        self.stream.take(command, self.engine)  # type: ignore[arg-type]

    def step(self, position: int, *, session: int = -1) -> None:
        """Generate a token in the last session submitted, as the engine's thread would say it."""
        engine_id = self.engine.submitted[session]
        self.stream.on_outputs([TokenOut(session_id=engine_id, position=position, token_id=position)])

    async def read(self) -> list[SessionEvent]:
        """Return the next message's events."""
        return list((await self.read_step()).sessions)

    async def read_step(self) -> StepEvent:
        """Return the next message."""
        return await anext(self._events)


async def test_steps_that_nobody_read_yet_travel_together_in_order() -> None:
    scene = Scene()
    scene.submit()
    scene.step(0)
    scene.step(1)
    await asyncio.sleep(0)

    assert [item.event.position for item in await scene.read()] == [0, 1]


async def test_a_refused_session_ends_with_its_error_and_can_be_sent_again() -> None:
    scene = Scene()
    scene.engine.is_full = True
    scene.submit()
    (item,) = await scene.read()
    assert (item.session_id, item.error.code) == ("ses-1", "queue_full")

    scene.engine.is_full = False
    scene.submit()
    assert len(scene.engine.submitted) == 1


async def test_a_request_out_of_range_never_reaches_the_engine() -> None:
    scene = Scene()
    scene.submit(max_tokens=0)
    (item,) = await scene.read()

    assert item.error.code == "invalid_request"
    assert scene.engine.submitted == []


async def test_a_cancelled_session_says_nothing_more() -> None:
    scene = Scene()
    scene.submit("ses-1")
    scene.cancel("ses-1")
    scene.step(0)
    scene.submit("ses-2")
    scene.step(7)
    await asyncio.sleep(0)

    assert scene.engine.cancelled == scene.engine.submitted[:1]
    assert [(item.session_id, item.event.position) for item in await scene.read()] == [("ses-2", 7)]


async def test_a_session_sent_again_after_its_cancel_is_another_one_for_the_engine() -> None:
    scene = Scene()
    scene.submit()
    scene.cancel()
    scene.submit()
    scene.step(0, session=0)
    scene.step(9, session=1)
    await asyncio.sleep(0)

    assert len(set(scene.engine.submitted)) == 2
    assert [item.event.position for item in await scene.read()] == [9]


async def test_a_session_that_runs_is_not_started_twice_under_one_epoch() -> None:
    scene = Scene()
    scene.submit()
    scene.submit()
    (item,) = await scene.read()

    assert item.error.code == "fenced"


async def test_a_finished_session_can_be_sent_again() -> None:
    scene = Scene()
    scene.submit()
    done = Finished(
        session_id=scene.engine.submitted[0],
        reason=FinishReason.STOP,
        prompt_token_count=1,
        generated_token_count=1,
    )
    scene.stream.on_outputs([done])
    await asyncio.sleep(0)
    await scene.read()
    scene.submit()

    assert len(scene.engine.submitted) == 2


async def test_when_the_engine_fails_every_session_ends_with_the_error() -> None:
    scene = Scene()
    scene.submit("ses-1")
    scene.submit("ses-2")
    scene.stream.fail(WorkerDied("the engine failed"))

    items = await scene.read()
    assert [(item.session_id, item.error.code) for item in items] == [
        ("ses-1", "worker_died"),
        ("ses-2", "worker_died"),
    ]


async def test_when_the_reader_goes_its_sessions_are_cancelled() -> None:
    scene = Scene()
    scene.submit("ses-1")
    scene.submit("ses-2")
    scene.stream.cancel_all(scene.engine)  # type: ignore[arg-type]

    assert scene.engine.cancelled == scene.engine.submitted


async def test_there_is_one_reader_at_a_time() -> None:
    scene = Scene()
    scene.submit()
    scene.step(0)
    await scene.read()

    with pytest.raises(AlreadyExists):
        await anext(scene.stream.events())


async def test_the_end_of_a_load_travels_before_or_with_the_first_token() -> None:
    scene = Scene()
    scene.submit()
    scene.stream.announce(LoadEnd(timings=StartTimings(weights_seconds=2.0)))
    assert not scene.stream.is_flushed()
    scene.step(0)
    await asyncio.sleep(0)

    step = await scene.read_step()
    assert step.load_end.timings.weights_seconds == 2.0
    assert [item.event.position for item in step.sessions] == [0]
    assert scene.stream.is_flushed()


async def test_the_end_of_a_load_does_not_overwrite_what_waits() -> None:
    scene = Scene()
    scene.submit()
    scene.step(0)
    await asyncio.sleep(0)
    scene.stream.announce(LoadEnd(error_code="load_failed"))

    step = await scene.read_step()
    assert (step.load_end.error_code, len(step.sessions)) == ("load_failed", 1)


async def test_a_session_waits_for_its_adapter_and_others_do_not() -> None:
    scene, adapters, weights = Scene(), PlayedAdapters(), object()
    scene.stream.use(adapters)  # type: ignore[arg-type]
    scene.submit("adapted", adapter="poet")
    scene.submit("plain")
    assert scene.engine.adapters == [None]

    adapters.coming.set_result(weights)
    await asyncio.sleep(0)

    assert scene.engine.adapters == [None, weights]
    scene.stream.on_outputs([_finished(scene.engine.submitted[1])])
    await asyncio.sleep(0)
    assert adapters.leases == 0


async def test_a_session_whose_adapter_does_not_come_fails_with_the_reason() -> None:
    scene, adapters = Scene(), PlayedAdapters()
    scene.stream.use(adapters)  # type: ignore[arg-type]
    scene.submit(adapter="poet")

    adapters.coming.set_exception(CheckpointInvalid("it is for another model"))
    events = await scene.read()

    assert [(event.session_id, event.error.code) for event in events] == [("ses-1", "checkpoint_invalid")]
    assert scene.engine.submitted == []


async def test_a_session_that_is_cancelled_while_its_adapter_comes_never_starts() -> None:
    scene, adapters = Scene(), PlayedAdapters()
    scene.stream.use(adapters)  # type: ignore[arg-type]
    scene.submit(adapter="poet")
    scene.cancel()

    adapters.coming.set_result(object())
    await asyncio.sleep(0)

    assert scene.engine.submitted == []
    assert adapters.leases == 0


async def test_a_worker_without_adapters_refuses_a_session_with_one() -> None:
    scene = Scene()

    scene.submit(adapter="poet")

    assert [event.error.code for event in await scene.read()] == ["invalid_request"]


def _finished(session_id: SessionId) -> Finished:
    return Finished(
        session_id=session_id, reason=FinishReason.LENGTH, prompt_token_count=1, generated_token_count=1
    )


class PlayedLink:
    """Keeps what was sent over it."""

    def __init__(self) -> None:
        self.steps: list[StepEvent] = []

    def send(self, body: bytes) -> None:
        """Take a message."""
        self.steps.append(StepEvent.FromString(body))


async def test_over_a_link_a_step_needs_no_turn_of_the_loop() -> None:
    scene, link = Scene(), PlayedLink()
    scene.stream.send_over(link, is_loading=False)
    scene.submit()
    scene.step(0)
    scene.step(1)

    assert [step.sessions[0].event.position for step in link.steps] == [0, 1]


async def test_over_a_link_no_token_goes_out_before_the_loads_end_nor_overtakes_another() -> None:
    scene, link = Scene(), PlayedLink()
    scene.stream.send_over(link, is_loading=True)
    scene.submit()
    asyncio.get_running_loop().call_soon(scene.stream.announce, LoadEnd(timings=StartTimings()))
    scene.step(0)
    scene.step(1)
    sent_at_once = list(link.steps)
    await asyncio.sleep(0)
    scene.step(2)

    assert not sent_at_once
    assert link.steps[0].HasField("load_end")
    assert [step.sessions[0].event.position for step in link.steps[1:]] == [0, 1, 2]


async def test_the_end_of_a_load_that_came_before_the_link_goes_over_it() -> None:
    scene, link = Scene(), PlayedLink()
    scene.stream.announce(LoadEnd(timings=StartTimings()))
    scene.stream.send_over(link, is_loading=True)
    scene.submit()
    scene.step(0)

    assert [step.HasField("load_end") for step in link.steps] == [True, False]


async def test_over_a_link_a_finished_session_is_let_go() -> None:
    scene, link = Scene(), PlayedLink()
    scene.stream.send_over(link, is_loading=False)
    scene.submit()
    engine_id = scene.engine.submitted[-1]
    scene.stream.on_outputs(
        [
            Finished(
                session_id=engine_id,
                reason=FinishReason.LENGTH,
                prompt_token_count=1,
                generated_token_count=1,
                timings=SessionTimings(),
            )
        ]
    )
    await asyncio.sleep(0)
    scene.cancel()

    assert link.steps[0].sessions[0].event.finish_reason
    assert not scene.engine.cancelled


async def test_a_refusal_goes_over_the_link_too() -> None:
    scene, link = Scene(), PlayedLink()
    scene.stream.send_over(link, is_loading=False)
    scene.engine.is_full = True
    scene.submit()

    assert link.steps[0].sessions[0].error.code == QueueFull.code
