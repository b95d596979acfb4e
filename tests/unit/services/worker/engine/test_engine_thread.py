from __future__ import annotations

import threading

import pytest

from services.worker.engine.engine_thread import EngineThread
from services.worker.engine.protocol import Finished, ResumeMode, TokenOut
from stoker.errors import NotFound
from tests.unit.services.worker.tiny_models import ids, request, run

PATIENCE_SECONDS = 120


class Collector:
    """Collects outputs and lets a test wait for an end."""

    def __init__(self) -> None:
        self.calls: list[list] = []
        self.ended = threading.Event()
        self.failure: BaseException | None = None

    def take(self, outputs: list) -> None:
        """Be the thread's `on_outputs`."""
        self.calls.append(outputs)
        if any(isinstance(o, Finished) for o in outputs):
            self.ended.set()

    def fail(self, error: BaseException) -> None:
        """Be the thread's `on_failure`."""
        self.failure = error
        self.ended.set()


@pytest.fixture
def collector() -> Collector:
    return Collector()


@pytest.fixture
def thread_of(collector, engine_of):
    """Start a thread over a tiny engine; close it after the test."""
    started: list[EngineThread] = []

    def make(engine=None) -> EngineThread:
        thread = EngineThread(engine or engine_of(), on_outputs=collector.take, on_failure=collector.fail)
        thread.start()
        started.append(thread)
        return thread

    yield make
    for thread in started:
        assert thread.close(PATIENCE_SECONDS)


def test_a_submit_wakes_the_thread_and_every_step_is_one_callback(thread_of, collector, engine_of) -> None:
    thread_of().submit(request())
    assert collector.ended.wait(PATIENCE_SECONDS)

    outs = [o for call in collector.calls for o in call if isinstance(o, TokenOut)]

    assert ids(outs) == ids(run(engine_of(), [request()])[0]["s"])
    assert len(collector.calls) == 12  # one per token; the end comes with the last


def test_a_cancel_reaches_a_running_session(thread_of, collector) -> None:
    thread = thread_of()
    thread.submit(request(max_tokens=500))
    thread.cancel("s")
    assert collector.ended.wait(PATIENCE_SECONDS)

    assert collector.calls[-1][-1].reason == "cancelled"


def test_a_snapshot_is_taken_between_steps_and_can_be_resumed(thread_of, collector) -> None:
    thread = thread_of()
    thread.submit(request(max_tokens=400))

    snapshot = thread.snapshot("s").result(PATIENCE_SECONDS)
    thread.cancel("s")
    assert collector.ended.wait(PATIENCE_SECONDS)
    collector.ended.clear()
    thread.resume(snapshot, ResumeMode.EXACT)
    thread.cancel("s")

    assert collector.ended.wait(PATIENCE_SECONDS)


def test_an_error_of_a_call_belongs_to_its_future(thread_of) -> None:
    with pytest.raises(NotFound):
        thread_of().snapshot("nobody").result(PATIENCE_SECONDS)


def test_an_error_of_a_step_ends_the_thread_and_is_handed_over(thread_of, collector, engine_of) -> None:
    engine = engine_of()

    def broken() -> list:
        raise MemoryError("no more")

    engine.step = broken
    thread_of(engine).submit(request())

    assert collector.ended.wait(PATIENCE_SECONDS)
    assert isinstance(collector.failure, MemoryError)


def test_calls_after_close_are_cancelled(collector, engine_of) -> None:
    thread = EngineThread(engine_of(), on_outputs=collector.take, on_failure=collector.fail)

    assert thread.close()
    assert thread.snapshot("s").cancelled()
