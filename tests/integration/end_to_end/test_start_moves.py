"""A node is made free, for a model whose bytes it has or by a drain: who streams there goes on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI, AsyncStream
from openai.types import Completion

from stoker.client import AsyncClient
from stoker.v1 import controller_pb2, model_pb2
from tests.integration.end_to_end.stoker_up import StokerUp, stoker_up
from tests.integration.tiny_model import make_tiny_model

DISK_MB_PER_SECOND = 4
STREAM_TOKENS = 12_000
"""More than any machine makes while a model starts twice."""
COMPARED_TOKENS = 60


@pytest.fixture
def up(tmp_path: Path) -> Iterator[StokerUp]:
    """Two nodes with a device each, on slow disks; what has just started may go at once."""
    shape = ("--nodes", "2", "--devices", "1", "--disk-bandwidth", str(DISK_MB_PER_SECOND))
    policy = ("--set", "controller.minimum_residency_seconds=0")
    with stoker_up(tmp_path / "up", *shape, *policy) as running:
        yield running


async def test_a_start_moves_the_stream_away_from_the_node_that_has_the_bytes_and_a_drain_moves_it_back(
    up: StokerUp, tmp_path: Path
) -> None:
    small = make_tiny_model(tmp_path / "small", context_tokens=STREAM_TOKENS + 100)
    large = make_tiny_model(tmp_path / "large", hidden=512, layers=2)
    async with (
        AsyncClient(gateway=up.cluster.gateway, controller=up.cluster.controller) as admin,
        AsyncOpenAI(base_url=f"{up.cluster.rest_url}/v1", api_key="none", timeout=120) as client,
    ):
        await admin.deploy(_spec("small", small, keep_alive_seconds=-1))
        await admin.deploy(_spec("large", large, keep_alive_seconds=0))
        ask = client.completions.create
        calm = await ask(model="small", prompt="the", max_tokens=COMPARED_TOKENS, temperature=0)
        large_answers = asyncio.create_task(ask(model="large", prompt="the", max_tokens=1))
        (has_large,) = await _nodes_of(admin, "large", count=1)
        (has_small,) = await _nodes_of(admin, "small", count=1)
        await large_answers
        await _nodes_of(admin, "large", count=0)
        stream = await ask(model="small", prompt="the", max_tokens=STREAM_TOKENS, temperature=0, stream=True)
        seen = await _text(stream, tokens=5)
        await admin.migrate("small", has_large)
        while await _nodes_of(admin, "small") != {has_large}:
            seen += await _text(stream, tokens=1)

        answer = await ask(model="large", prompt="the", max_tokens=1)

        seen += await _text(stream, tokens=5)
        after_the_start = await _nodes_of(admin, "small", count=1)
        await _nodes_of(admin, "large", count=0)
        await admin.set_node_scheduling(has_small, controller_pb2.NODE_SCHEDULING_DRAINED)
        while await _nodes_of(admin, "small") != {has_large}:
            seen += await _text(stream, tokens=1)
        seen += await _text(stream, tokens=5)
        await stream.close()

    assert answer.usage is not None
    assert has_small != has_large
    assert after_the_start == {has_small}
    moves = up.log_events("gateway", "session.moved")
    assert [moved["to_node_id"] for moved in moves] == [has_large, has_small, has_large]
    assert "drain" in moves[-1]["reason"]
    # The stream never broke; large, without residency, may go between its start and its request.
    assert "small" not in {event["model"] for event in up.log_events("gateway", "session.resumed")}
    assert up.log_events("controller", "replica.placed")[-1]["tier"] == "dram"
    assert calm.choices[0].text.startswith(seen[: len(calm.choices[0].text)])


def _spec(name: str, folder: Path, *, keep_alive_seconds: float) -> model_pb2.ModelSpec:
    return model_pb2.ModelSpec(
        name=name, checkpoint_uri=str(folder), keep_alive_seconds=keep_alive_seconds, max_replicas=1
    )


async def _text(stream: AsyncStream[Completion], *, tokens: int) -> str:
    text = ""
    for _ in range(tokens):
        text += (await anext(aiter(stream))).choices[0].text
    return text


async def _nodes_of(admin: AsyncClient, model: str, *, count: int | None = None) -> set[str]:
    """Return where a model's replicas are; with a count, once it has so many."""
    while True:
        replicas = await admin.replicas(model)
        if count is None or len(replicas) == count:
            return {replica.node_id for replica in replicas}
        await asyncio.sleep(0.1)
