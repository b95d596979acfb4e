"""One node for all tests of this folder that do not need their own, and the tiny model it serves."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from stoker.v1.node_agent_pb2 import REPLICA_STATE_READY
from tests.integration.node_agent.cluster import LONG_TOKENS, OneNode
from tests.integration.tiny_model import make_tiny_model


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a folder whose path is short: those below it have to fit a unix socket's address."""
    with tempfile.TemporaryDirectory(prefix="stoker-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Llama."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Llama that goes on for longer than any test waits: `LONG_TOKENS`."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "long", context_tokens=LONG_TOKENS + 100)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_node(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OneNode]:
    """Run a store and a node agent."""
    async with OneNode(tmp_path_factory.mktemp("n")) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(shared_node: OneNode, tiny_model: Path) -> OneNode:
    """Return the node, with the replica `rep-shared` ready on device 0."""
    await shared_node.start_replica("rep-shared", tiny_model)
    await shared_node.listener.replica("rep-shared", REPLICA_STATE_READY)
    return shared_node


@pytest_asyncio.fixture(loop_scope="module")
async def node(shared_node: OneNode) -> AsyncIterator[OneNode]:
    """Return the node with device 1 free, and leave it so."""
    yield shared_node
    for replica in list(shared_node.listener.latest.replicas):
        if replica.replica_id != "rep-shared":
            await shared_node.stop_replica(replica.replica_id)
