"""A node is made free, for a start, by a drain or for a model that fits nowhere: streams go on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI, AsyncStream
from openai.types import Completion

from stoker.checkpoint.convert import convert
from stoker.client import AsyncClient
from stoker.v1 import controller_pb2, model_pb2
from tests.integration.end_to_end.stoker_up import StokerUp, stoker_up
from tests.integration.tiny_model import make_tiny_model

DISK_MB_PER_SECOND = 4
STREAM_TOKENS = 12_000
"""More than any machine makes while a model starts twice."""
COMPARED_TOKENS = 60


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StokerUp]:
    """Two nodes with two devices each, on slow disks; what has just started may go at once."""
    shape = ("--nodes", "2", "--devices", "2", "--disk-bandwidth", str(DISK_MB_PER_SECOND))
    soon = ("minimum_residency_seconds=0", "rebalance_rest_seconds=0", "rebalance_hysteresis_ratio=1")
    settings = [part for each in soon for part in ("--set", f"controller.{each}")]
    with stoker_up(tmp_path_factory.mktemp("up"), *shape, *settings) as running:
        yield running


async def test_a_start_moves_the_stream_away_from_the_node_that_has_the_bytes_and_a_drain_moves_it_back(
    up: StokerUp, tmp_path: Path
) -> None:
    small = make_tiny_model(tmp_path / "small", context_tokens=STREAM_TOKENS + 100)
    large = tmp_path / "large"
    convert(make_tiny_model(tmp_path / "whole", hidden=512, layers=2), large, tensor_parallel=2)
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
        last_placed = up.log_events("controller", "replica.placed")[-1]
        await admin.set_node_scheduling(has_small, controller_pb2.NODE_SCHEDULING_OPEN)
        await _deleted(admin, "small", "large")

    assert answer.usage is not None
    assert has_small != has_large
    assert after_the_start == {has_small}
    moves = _told(up, "session.moved", "small")
    assert [moved["to_node_id"] for moved in moves] == [has_large, has_small, has_large]
    assert "drain" in moves[-1]["reason"]
    # The stream never broke; large, without residency, may go between its start and its request.
    assert _told(up, "session.resumed", "small") == []
    assert last_placed["tier"] == "dram"
    assert calm.choices[0].text.startswith(seen[: len(calm.choices[0].text)])


async def test_a_node_is_cleared_before_a_likely_model_of_two_devices_is_asked_for(
    up: StokerUp, tmp_path: Path
) -> None:
    slow = make_tiny_model(tmp_path / "slow", layers=24, context_tokens=STREAM_TOKENS + 100)
    convert(make_tiny_model(tmp_path / "whole"), tmp_path / "wide", tensor_parallel=2)
    async with (
        AsyncClient(gateway=up.cluster.gateway, controller=up.cluster.controller) as admin,
        AsyncOpenAI(base_url=f"{up.cluster.rest_url}/v1", api_key="none", timeout=120) as client,
    ):
        ask = client.completions.create
        await admin.deploy(_spec("wide", tmp_path / "wide", keep_alive_seconds=0))
        await asyncio.gather(*(ask(model="wide", prompt="the", max_tokens=1) for _ in range(2)))
        await _nodes_of(admin, "wide", count=0)
        streams = []
        for name in ("one", "two"):
            await admin.deploy(_spec(name, slow, keep_alive_seconds=-1))
            stream = await ask(model=name, prompt="the", max_tokens=STREAM_TOKENS, temperature=0, stream=True)
            streams.append(stream)
            (its_node,) = await _nodes_of(admin, name, count=1)
            await admin.set_node_scheduling(its_node, controller_pb2.NODE_SCHEDULING_CORDONED)
        for node in ("node-1", "node-2"):
            await admin.set_node_scheduling(node, controller_pb2.NODE_SCHEDULING_OPEN)
        seen = [await _text(stream, tokens=1) for stream in streams]
        while await _nodes_of(admin, "one") != await _nodes_of(admin, "two"):
            seen = [text + await _text(stream, tokens=1) for text, stream in zip(seen, streams, strict=True)]

        answer = await ask(model="wide", prompt="the", max_tokens=1)

        seen = [text + await _text(stream, tokens=5) for text, stream in zip(seen, streams, strict=True)]
        for stream in streams:
            await stream.close()
        calm = await ask(model="one", prompt="the", max_tokens=COMPARED_TOKENS, temperature=0)
        await _deleted(admin, "one", "two", "wide")

    assert answer.usage is not None
    (cleared,) = _told(up, "node.cleared", "wide", by="controller")
    assert cleared["reason"] == "the model will want a place"
    (moved,) = _told(up, "session.moved", "one", "two")
    assert moved["from_node_id"] == cleared["node_id"]
    assert up.log_events("controller", "replica.placed")[-1]["node_id"] == cleared["node_id"]
    assert _told(up, "session.resumed", "one", "two") == []
    for text in seen:
        assert calm.choices[0].text.startswith(text[: len(calm.choices[0].text)])


def _spec(name: str, folder: Path, *, keep_alive_seconds: float) -> model_pb2.ModelSpec:
    return model_pb2.ModelSpec(
        name=name, checkpoint_uri=str(folder), keep_alive_seconds=keep_alive_seconds, max_replicas=1
    )


def _told(up: StokerUp, event: str, *models: str, by: str = "gateway") -> list[dict]:
    """Return what a service's log says of these models."""
    return [found for found in up.log_events(by, event) if found["model"] in models]


async def _deleted(admin: AsyncClient, *models: str) -> None:
    """Leave the cluster as empty as it was."""
    for name in models:
        await admin.delete(name)
        await _nodes_of(admin, name, count=0)


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
