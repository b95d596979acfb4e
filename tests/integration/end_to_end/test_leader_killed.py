"""The leading controller is killed, then etcd, under agents, workers and a gateway: no client notices."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from openai import AsyncOpenAI, AsyncStream
from openai.types import Completion

from stoker.cli.free_ports import free_ports
from stoker.client import AsyncClient
from stoker.errors import PeerError
from stoker.rpc import connect
from stoker.v1 import model_pb2
from stoker.v1.node_agent_pb2 import GetReportRequest, MoveSessionsRequest
from stoker.v1.node_agent_pb2_grpc import NodeAgentStub
from tests.integration.controller.harness import until
from tests.integration.etcd_server import etcd_server
from tests.integration.gateway.gateway_process import GatewayProcess
from tests.integration.node_agent.processes import ServiceProcess
from tests.integration.tiny_model import make_tiny_model

pytestmark = pytest.mark.etcd

MANY_TOKENS = 12_000
"""More than any machine makes while a new leader is found."""
ANY_FENCE = 2**62
"""Of an order that no controller gives."""


class Fleet:
    """Two controllers on an etcd, a node agent, its store, a gateway."""

    def __init__(
        self,
        controllers: dict[str, ServiceProcess],
        store: ServiceProcess,
        agent: ServiceProcess,
        gateway: GatewayProcess,
    ) -> None:
        self.controllers = controllers
        self.agent = agent
        self.store = store
        self.url = f"{gateway.url}/v1"
        self.gateway = gateway

    async def leader(self) -> ServiceProcess:
        """Return the process that leads, once one does."""
        found: list[ServiceProcess] = []

        async def one_leads() -> bool:
            for address, process in self.controllers.items():
                async with AsyncClient(gateway=self.gateway.grpc_address, controller=address) as asked:
                    try:
                        if (await asked.status()).leading:
                            found.append(process)
                    except PeerError:
                        continue
            return bool(found)

        await until(one_leads)
        return found[0]

    async def deploy(self, folder: Path, *names: str) -> None:
        """Deploy the same checkpoint under several names, once the node has joined."""
        leader = await self.leader()
        address = next(found for found, process in self.controllers.items() if process is leader)
        async with AsyncClient(gateway=self.gateway.grpc_address, controller=address) as admin:

            async def has_joined() -> bool:
                return len(await admin.nodes()) == 1

            await until(has_joined)
            for name in names:
                spec = model_pb2.ModelSpec(name=name, checkpoint_uri=str(folder), keep_alive_seconds=-1)
                if name == "warm":
                    spec.min_replicas = spec.max_replicas = 2
                await admin.deploy(spec)


@asynccontextmanager
async def fleet(folder: Path, state: str) -> AsyncGenerator[Fleet, None]:
    """Run it."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    store_address = f"127.0.0.1:{free_ports(1)[0]}"
    store = ServiceProcess(
        "store", address=store_address, run_dir=folder, pool_bytes=64 << 20, chunk_bytes=1 << 20
    )
    controllers = [
        ServiceProcess("controller", address=address, state=state, leader_ttl_seconds=2)
        for address in addresses
    ]
    agent = ServiceProcess(
        "node_agent",
        node_id="a",
        address=f"127.0.0.1:{free_ports(1)[0]}",
        store=store_address,
        attach_socket=folder / "attach.sock",
        controllers=addresses,
        run_dir=folder / "a",
        log_dir=folder / "a" / "logs",
        cpu_slots=3,
        use_gpus=False,
        prestarted_workers=0,
        drain_seconds=0.1,
    )
    gateway = GatewayProcess(addresses[0], folder / "cache", controllers=json.dumps(addresses))
    async with AsyncExitStack() as stack:
        services = (store, *controllers, agent)
        await asyncio.gather(*(stack.enter_async_context(service) for service in services))
        await stack.enter_async_context(gateway)
        yield Fleet(dict(zip(addresses, controllers, strict=True)), store, agent, gateway)


async def text_of(stream: AsyncStream[Completion], *, tokens: int) -> str:
    """Return the text of the next so many tokens."""
    text = ""
    for _ in range(tokens):
        text += (await anext(aiter(stream))).choices[0].text
    return text


async def move(running: Fleet) -> None:
    """Have the one stream that runs moved to the other replica of its model."""
    address = (await running.agent.wait_for_log("agent.listening"))["address"]
    async with connect(address) as channel:
        stub = NodeAgentStub(channel)
        report = await stub.GetReport(GetReportRequest())
        source, to = sorted(
            (each for each in report.replicas if each.model == "warm"),
            key=lambda each: -each.running_sessions,
        )
        order = MoveSessionsRequest(
            replica_id=source.replica_id, to_replica_id=to.replica_id, reason="test", fence=ANY_FENCE
        )
        assert (await stub.MoveSessions(order)).sessions == 1


async def test_leader_and_etcd_are_killed_while_a_stream_runs_and_moves_and_a_cold_request_waits(
    tmp_path: Path,
) -> None:
    folder = make_tiny_model(tmp_path / "model", context_tokens=MANY_TOKENS + 100)
    async with AsyncExitStack() as stack:
        etcd = stack.enter_context(etcd_server())
        running = await stack.enter_async_context(fleet(tmp_path, f"etcd://{etcd.endpoint}/fleet"))
        client = AsyncOpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=120)
        ask = (await stack.enter_async_context(client)).completions.create
        await running.deploy(folder, "warm", "cold")
        leader = await running.leader()
        stream = await ask(model="warm", prompt="the", max_tokens=MANY_TOKENS, temperature=0, stream=True)
        seen, count = await text_of(stream, tokens=10), 20

        running.store.send(signal.SIGSTOP)  # the cold start is ordered and goes no further: it gets no bytes
        cold = asyncio.create_task(ask(model="cold", prompt="the", max_tokens=3, temperature=0))
        await leader.wait_for_log("replica.placed", model="cold")
        leader.send(signal.SIGKILL)
        await leader.ended()
        running.store.send(signal.SIGCONT)

        answer = await cold
        survivor = await running.leader()
        seen += await text_of(stream, tokens=10)
        etcd.kill()
        await move(running)
        moving = asyncio.create_task(running.gateway.wait_for_log("session.moved"))
        while not moving.done() or count <= moving.result()["tokens"]:
            seen, count = seen + await text_of(stream, tokens=1), count + 1
        await stream.close()
        etcd.start()
        expected = await ask(model="warm", prompt="the", max_tokens=count, temperature=0)
        stopped = [line for line in survivor.log if line["event"] == "replica.stopped"]

    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert survivor is not leader
    assert stopped == []
    assert moving.result()["path"] == "ship"
    assert seen.startswith(expected.choices[0].text)
