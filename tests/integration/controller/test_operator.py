"""An operator at a real controller: files deployed, decisions explained, nodes drained, events told."""

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
    """A controller with one node, and a terminal."""

    def __init__(self, controller: ControllerProcess, client: Client, node: FakeNode) -> None:
        self.controller, self.client, self.node = controller, client, node

    async def run(self, *words: str) -> str:
        """Run a command that succeeds; returns what it printed."""
        result = await asyncio.to_thread(self._invoke, words)
        assert result.exit_code == 0, (words, result.output, result.exception)
        return result.output

    async def refused(self, *words: str) -> str:
        """Run a command that is refused; returns why."""
        result = await asyncio.to_thread(self._invoke, words)
        assert isinstance(result.exception, StokerError), (words, result.output, result.exception)
        return result.exception.message

    def _invoke(self, words: tuple[str, ...]):
        return CliRunner().invoke(app, [*words, "--controller", self.controller.address])


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncGenerator[Desk, None]:
    async with AsyncExitStack() as stack:
        controller = ControllerProcess(tmp_path, f"embedded://{tmp_path}/state.db")
        stack.callback(controller.kill)
        controller.start()
        client = Client(await stack.enter_async_context(connect(controller.address)))
        node = FakeNode("node-1", devices=2)
        await stack.enter_async_context(node.serving())
        await stack.enter_async_context(node.joined(controller.address))

        async def joined() -> bool:
            with translated("controller"):
                return bool((await client.stub.ListNodes(pb.ListNodesRequest())).nodes)

        await until(joined)
        yield Desk(controller, client, node)


async def test_an_operator_deploys_a_file_and_sees_what_happens_and_why(desk: Desk, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(
        "models:\n  - {name: one, checkpoint_uri: /m/one}\n"
        "  - {name: two, checkpoint_uri: /m/two, devices: 2}\n"
    )
    refusal = await desk.refused("deploy", "-f", str(file))
    after_refusal = await desk.client.models()
    file.write_text("models:\n  - {name: one, checkpoint_uri: /m/one, pinned: true}\n")
    dry = await desk.run("deploy", "-f", str(file), "--dry-run")
    after_dry_run = await desk.client.models()
    await desk.run("deploy", "-f", str(file))
    await desk.client.deploy("other")
    pruned = await desk.run("deploy", "-f", str(file), "--prune")
    models = await desk.client.models()

    assert f"{file}:3: model two: devices is 2, and checkpoint /m/two is in one piece" in refusal
    assert (after_refusal, after_dry_run) == ({}, {})
    assert "+ one" in dry
    assert "- other" in pruned
    assert ([*models], models["one"].spec.pinned) == (["one"], True)

    await desk.client.acquire("one", request_id="req-1")
    explained = await desk.run("explain", "req-1")
    cordoned = await desk.run("cordon", "node-1")
    nodes = await desk.run("nodes")
    await desk.run("drain", "node-1")
    await until(lambda: not desk.node.replicas)
    await desk.run("undrain", "node-1")
    mistyped = await desk.run("drain", "nod-1")
    events = await desk.run("events")

    assert "node-1" in explained
    assert "cordoned" in nodes, cordoned
    assert "no node of that id has joined" in mistyped
    for kind in ("model.deployed", "replica.placed", "replica.ready", "node.scheduling_set"):
        assert kind in events
    with translated("controller"):
        decisions = (await desk.client.stub.Explain(pb.ExplainRequest(subject="one"))).decisions
    assert [decision.outcome for decision in decisions if decision.choice == "start"] == ["ready"]
