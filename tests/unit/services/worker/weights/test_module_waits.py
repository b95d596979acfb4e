"""A forward pass that begins before its weights are there: the same tokens, whatever arrives when."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from services.worker.engine.engine_thread import EngineThread
from services.worker.engine.protocol import EngineLimits, FinishReason
from services.worker.engine.transformers_engine import TransformersEngine
from services.worker.model_loading import build_skeleton
from services.worker.weights.module_waits import wait_for_weights
from services.worker.weights.weights_gate import WeightsGate
from stoker.checkpoint.execution_order import execution_order
from stoker.errors import LoadFailed
from stoker.models.weights import assign_weights
from tests.unit.services.worker.engine.test_engine_thread import PATIENCE_SECONDS, Collector
from tests.unit.services.worker.tiny_models import config_json, reference, request, run

MODELS = ("llama", "llama_tied", "gpt2", "opt", "gemma2", "qwen3_moe")


class Arriving:
    """A model whose tensors hold NaN until the test brings their content."""

    def __init__(self, name: str) -> None:
        model = reference(name)
        stored = {
            key: value for key, value in model.state_dict().items() if not self._is_tied_copy(model, key)
        }
        self.placed = {key: torch.full_like(value, torch.nan) for key, value in stored.items()}
        order = execution_order(stored)
        self.stage_of: dict[str, int] = {}
        self.stages: list[list[str]] = []
        for stage, (_, members) in enumerate(groupby(order, key=lambda each: each.layer)):
            self.stages.append([each.name for each in members])
            self.stage_of.update(dict.fromkeys(self.stages[-1], stage))
        self._stored = stored
        self.gate = WeightsGate(len(self.stages))
        built = assign_weights(build_skeleton(config_json(model)), self.placed)
        self.needs = wait_for_weights(built, self.placed, self.stage_of, self.gate)
        self.engine = TransformersEngine(built, EngineLimits(prefill_chunk_tokens=32))
        self.whole = TransformersEngine(
            assign_weights(build_skeleton(config_json(model)), dict(stored)),
            EngineLimits(prefill_chunk_tokens=32),
        )

    @staticmethod
    def _is_tied_copy(model, key: str) -> bool:
        return key in model.all_tied_weights_keys

    def bring(self, stage: int) -> None:
        """Let a stage's weights arrive."""
        for name in self.stages[stage]:
            self.placed[name].copy_(self._stored[name])
        self.gate.open(stage + 1)

    def bring_all(self) -> None:
        """Let everything arrive, in order."""
        for stage in range(len(self.stages)):
            self.bring(stage)


@pytest.fixture
def collector() -> Collector:
    return Collector()


def started(arriving: Arriving, collector: Collector) -> EngineThread:
    thread = EngineThread(
        arriving.engine,
        on_outputs=collector.take,
        on_failure=collector.fail,
        interrupt=arriving.gate.interrupt,
    )
    thread.start()
    return thread


def tokens_of(collector: Collector) -> list[int]:
    return [out.token_id for call in collector.calls for out in call if hasattr(out, "token_id")]


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_that_began_before_its_weights_gives_the_tokens_of_a_whole_model(name, collector) -> None:
    arriving = Arriving(name)
    thread = started(arriving, collector)
    prompt = tuple(range(1, 50))  # two chunks: the first one runs without the head
    thread.submit(request(prompt=prompt))

    arriving.bring_all()
    assert collector.ended.wait(PATIENCE_SECONDS)
    assert thread.close(PATIENCE_SECONDS)

    whole = run(arriving.whole, [request(prompt=prompt)])[0]["s"]
    assert tokens_of(collector) == [out.token_id for out in whole]
    assert arriving.needs == len(arriving.stages)


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_is_waited_for(name, monkeypatch) -> None:
    arriving = Arriving(name)
    waited: list[int] = []
    monkeypatch.setattr(arriving.gate, "wait", waited.append)
    for stage in range(len(arriving.stages)):  # the content is there, the gate does not say so
        for key in arriving.stages[stage]:
            arriving.placed[key].copy_(arriving._stored[key])

    arriving.engine.submit(request(max_tokens=1))
    arriving.engine.step()

    assert set(waited) == set(range(len(arriving.stages)))


def test_once_all_is_there_nothing_is_asked_any_more() -> None:
    arriving = Arriving("llama")
    arriving.bring_all()
    run(arriving.engine, [request()])

    assert not any(module._forward_pre_hooks for module in arriving.engine._runner._model.modules())


def test_a_cancel_is_answered_while_the_pass_waits(collector) -> None:
    arriving = Arriving("llama")
    thread = started(arriving, collector)
    thread.submit(request())

    thread.cancel("s")

    assert collector.ended.wait(PATIENCE_SECONDS)
    assert collector.calls[-1][-1].reason is FinishReason.CANCELLED
    assert thread.close(PATIENCE_SECONDS)


def test_a_call_is_answered_while_the_pass_waits_and_the_pass_is_made_again(collector) -> None:
    arriving = Arriving("llama")
    thread = started(arriving, collector)
    thread.submit(request())
    arriving.bring(0)
    arriving.bring(1)

    assert thread.snapshot("s").result(PATIENCE_SECONDS).generated_token_ids == ()
    arriving.bring_all()
    assert collector.ended.wait(PATIENCE_SECONDS)
    assert thread.close(PATIENCE_SECONDS)

    assert tokens_of(collector) == [out.token_id for out in run(arriving.whole, [request()])[0]["s"]]


def test_a_worker_can_be_stopped_while_the_pass_waits(collector) -> None:
    arriving = Arriving("llama")
    thread = started(arriving, collector)
    thread.submit(request())

    assert thread.close(PATIENCE_SECONDS)


def test_a_load_that_fails_ends_the_pass_with_its_reason(collector) -> None:
    arriving = Arriving("llama")
    thread = started(arriving, collector)
    thread.submit(request())
    lost = LoadFailed("disk broke")
    arriving.gate.fail(lost)

    assert collector.ended.wait(PATIENCE_SECONDS)
    assert collector.failure is lost
    assert collector.calls == []
