"""The worker's rpcs while weights arrive, called as its server calls them; no sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from services.worker import load
from services.worker.settings import WorkerSettings
from services.worker.shell import WorkerShell
from stoker.v1.model_pb2 import ModelSpec
from stoker.v1.session_pb2 import GenerateRequest, Sampling
from stoker.v1.worker_pb2 import LoadModelRequest, LoadModelResponse, RunCommand, StepEvent
from tests.unit.services.worker.test_load import ScriptedStore
from tests.unit.services.worker.tiny_models import reference


class Scene:
    """A warm worker, the store it loads from, and the agent's end of its stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = ScriptedStore(reference("llama"))
        monkeypatch.setattr(load, "attach", self.store.attach)
        self.shell = WorkerShell(WorkerSettings(socket="/s", worker_id="w"), asyncio.Event())
        self.shell._warm = asyncio.get_running_loop().create_future()
        self.shell._warm.set_result([])
        self._commands: asyncio.Queue[RunCommand] = asyncio.Queue()
        self._steps = self.shell.Run(self._sent(), None)  # type: ignore[arg-type]

    async def load(self) -> LoadModelResponse:
        """Order the model."""
        asked = LoadModelRequest(spec=ModelSpec(name="m", max_context_tokens=64))
        return await self.shell.LoadModel(asked, None)  # type: ignore[arg-type]

    def submit(self) -> None:
        """Send a session."""
        wanted = GenerateRequest(
            session_id="ses-1", epoch=1, prompt_token_ids=[1, 2], sampling=Sampling(max_tokens=2)
        )
        self._commands.put_nowait(RunCommand(submit=wanted))

    async def step(self) -> StepEvent:
        """Return what the worker says next."""
        async with asyncio.timeout(120):
            return await anext(self._steps)

    async def close(self) -> None:
        """End the stream and the engine."""
        with suppress(BaseExceptionGroup):  # a call that its client leaves is cancelled within its task group
            await self._steps.aclose()
        if self.shell._engine is not None:
            assert await asyncio.to_thread(self.shell._engine.close, 120.0)

    async def _sent(self) -> AsyncIterator[RunCommand]:
        while True:
            yield await self._commands.get()


async def test_sessions_are_taken_while_weights_arrive_and_the_loads_end_comes_before_tokens(
    monkeypatch,
) -> None:
    scene = Scene(monkeypatch)
    answer = await scene.load()
    scene.submit()
    scene.store.bring(0.5)
    scene.store.finish()

    first = await scene.step()
    await scene.close()

    assert answer.loading
    assert answer.timings.weights_seconds == 0
    assert answer.max_context_tokens == 64
    assert first.load_end.timings.weights_seconds == 1.5
    assert first.load_end.timings.skeleton_seconds > 0


async def test_a_load_that_breaks_is_told_with_its_reason_and_yields_no_token(monkeypatch) -> None:
    scene = Scene(monkeypatch)
    await scene.load()
    scene.submit()
    scene.store.bring(0.5)
    scene.store.break_down()

    first = await scene.step()
    await scene.close()

    assert (first.load_end.error_code, first.load_end.error_message) == ("load_failed", "disk broke")
    assert not first.load_end.HasField("timings")
    assert not first.sessions


async def test_a_load_whose_weights_were_all_there_is_complete_at_once(monkeypatch) -> None:
    scene = Scene(monkeypatch)
    scene.store.finish()
    answer = await scene.load()
    if answer.loading:  # the last pages were still being entered
        assert (await scene.step()).load_end.timings.weights_seconds == 1.5
    else:
        assert answer.timings.weights_seconds == 1.5
    await scene.close()
