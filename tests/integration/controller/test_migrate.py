"""`stoker migrate` at a real controller over two nodes: what is ordered, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stoker.cli.main import app
from stoker.errors import StokerError
from stoker.rpc import connect, translated
from stoker.v1 import controller_pb2 as pb
from tests.integration.controller.harness import Client, ControllerProcess, FakeNode, until


class Desk:
    """A controller, two nodes of one slot each, and a terminal."""

    def __init__(self, controller: ControllerProcess, client: Client, nodes: dict[str, FakeNode]) -> None:
        self.controller, self.client, self.nodes = controller, client, nodes

    async def migrate(self, subject: str, to: str) -> str:
        """Return what the command prints."""
        result = await asyncio.to_thread(self._invoke, subject, to)
        assert result.exit_code == 0, (result.output, result.exception)
        return " ".join(result.output.split())

    async def refused(self, subject: str, to: str) -> str:
        """Return why it is refused."""
        result = await asyncio.to_thread(self._invoke, subject, to)
        assert isinstance(result.exception, StokerError), (result.output, result.exception)
        return result.exception.message

    def _invoke(self, subject: str, to: str):
        command = ["migrate", subject, "--to", to, "--controller", self.controller.address]
        return CliRunner().invoke(app, command)

    def split(self) -> tuple[FakeNode, FakeNode]:
        """Return the node with a replica, and the other."""
        with_one, other = sorted(self.nodes.values(), key=lambda node: -len(node.replicas))
        return with_one, other


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncGenerator[Desk, None]:
    async with AsyncExitStack() as stack:
        controller = ControllerProcess(tmp_path, f"embedded://{tmp_path}/state.db")
        stack.callback(controller.kill)
        controller.start()
        client = Client(await stack.enter_async_context(connect(controller.address)))
        nodes = {name: FakeNode(name, devices=1) for name in ("node-1", "node-2")}
        for node in nodes.values():
            await stack.enter_async_context(node.serving())
            await stack.enter_async_context(node.joined(controller.address))

        async def joined() -> bool:
            with translated("controller"):
                return len((await client.stub.ListNodes(pb.ListNodesRequest())).nodes) == len(nodes)

        await until(joined)
        await client.deploy("one", keep_alive_seconds=-1)
        yield Desk(controller, client, nodes)


async def test_a_model_moves_to_a_node_with_all_its_sessions_or_is_refused_with_the_reason(
    desk: Desk,
) -> None:
    assert "runs nowhere" in await desk.refused("one", "node-1")
    await desk.client.acquire("one")
    source, target = desk.split()
    (source_id,) = source.replicas

    printed = await desk.migrate("one", target.node_id)
    await until(lambda: not source.replicas)

    (target_id,) = target.replicas
    assert f"from {source.node_id} to {target.node_id} (replica {target_id}, started for it)" in printed
    assert source.moved == [(source_id, target_id)]
    assert source.stops == [(source_id, False, f"moved to {target_id}")]
    assert "already" in await desk.refused("one", target.node_id)
    assert "'node-9' has not joined; there are: node-1, node-2" in await desk.refused("one", "node-9")
    assert "neither a deployed model nor a request" in await desk.refused("req-9", target.node_id)
    await desk.client.deploy("two", keep_alive_seconds=-1)
    await desk.client.acquire("two")
    assert "no free slots" in await desk.refused("one", source.node_id)


async def test_one_request_moves_alone_and_its_model_is_started_there_first(desk: Desk) -> None:
    await desk.client.acquire("one")
    source, target = desk.split()
    (source_id,) = source.replicas
    source.requests["req-1"] = source_id

    assert "1 of at most 1 elsewhere" in await desk.refused("req-1", target.node_id)
    await desk.client.deploy("one", keep_alive_seconds=-1, max_replicas=2)
    printed = await desk.migrate("req-1", target.node_id)

    (target_id,) = target.replicas
    assert "1 stream of model one" in printed
    assert target_id in printed
    assert source.moved == [("req-1", target_id)]
    assert source.stops == []
    assert list(source.replicas) == [source_id]
