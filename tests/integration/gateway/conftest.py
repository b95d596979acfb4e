"""One fake cluster and one real gateway for all tests of this folder that do not need their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import openai
import pytest
import pytest_asyncio

from tests.integration.gateway.fake_cluster import FakeCluster, says
from tests.integration.gateway.gateway_process import GatewayProcess


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_cluster() -> AsyncIterator[FakeCluster]:
    """Run the fake cluster with one warm model, `tiny`."""
    async with FakeCluster() as cluster:
        cluster.controller.push(cluster.route("tiny"))
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    shared_cluster: FakeCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[GatewayProcess]:
    """Run a gateway on it."""
    cache_dir = tmp_path_factory.mktemp("gateway-cache")
    impatience = {"max_attempts": 3, "resume_timeout_seconds": 1}
    async with GatewayProcess(shared_cluster.controller_address, cache_dir, **impatience) as process:
        await process.wait_for_log("routes.synced")
        yield process


@pytest.fixture
def cluster(shared_cluster: FakeCluster) -> Iterator[FakeCluster]:
    """Return the cluster as if nothing had happened yet."""
    shared_cluster.agent.orders.clear()
    shared_cluster.agent.cancelled.clear()
    shared_cluster.agent.kept.clear()
    shared_cluster.agent.script = says("Hello!")
    shared_cluster.controller.acquired.clear()
    shared_cluster.controller.acquire_error = None
    shared_cluster.controller.may_start.clear()
    shared_cluster.controller.acquires_left.clear()
    yield shared_cluster
    shared_cluster.controller.may_start.set()


@pytest_asyncio.fixture(loop_scope="module")
async def client(gateway: GatewayProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    """Return the official client, without its retries."""
    base_url = f"{gateway.url}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=30) as opened:
        yield opened
