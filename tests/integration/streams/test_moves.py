"""A session that moves while it runs, and whatever dies meanwhile: the client sees the same bits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.gateway.text.model_text import ModelText
from services.worker.transformers_engine import TransformersEngine
from tests.integration.streams.cluster import Cluster, Event, Node
from tests.integration.streams.engines import LIMITS, Answer, Replicas, answer, engine_model, text_of
from tests.integration.tiny_model import make_tiny_model

PROMPT = [(7 * i) % 200 + 20 for i in range(40)]
HOW = {
    "temperature": 0.9,
    "top_k": 50,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.2,
    "max_tokens": 120,
    "top_logprobs": 2,
    "ignore_eos": True,
}

NewEngine = Callable[[], TransformersEngine]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("moves") / "tiny", layers=2)


@pytest.fixture(scope="module")
def text(folder: Path) -> ModelText:
    return text_of(folder)


@pytest.fixture(scope="module")
def new_engine(folder: Path) -> NewEngine:
    model = engine_model(folder, torch.bfloat16)
    return lambda: TransformersEngine(model, LIMITS)


@pytest.fixture(scope="module")
def wanted(new_engine: NewEngine, text: ModelText) -> Answer:
    return asyncio.run(answer(Replicas(new_engine), text, PROMPT, **HOW))


def leave_at(*positions: int) -> Callable[..., None]:
    """Ask the session's owner to let it go once it has given so many tokens."""
    left = list(positions)

    def happening(cluster: Cluster, node: Node, order: object, event: Event) -> None:
        if left and event.position >= left[0] and event.tokens:
            left.pop(0)
            node.ask_to_leave()

    return happening


@pytest.mark.parametrize("position", [0, 1, 13, 60])
async def test_a_planned_move_changes_nothing(
    new_engine: NewEngine, text: ModelText, wanted: Answer, position: int
) -> None:
    async with Cluster(new_engine, leave_at(position)) as cluster:
        found = await answer(cluster, text, PROMPT, **HOW)
        owners = [order for order in cluster.orders if not order.follows]
        rounds = [order for order in cluster.orders if order.follows]

    assert found == wanted
    assert len(owners) == 1
    assert rounds
    assert {order.replica_id for order in rounds} == {"rep-1"}
    assert cluster.nodes["rep-0"].relay.session_count == 0
