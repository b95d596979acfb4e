"""A real store and a real node agent on free addresses, reporting to a controller that only listens."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

from stoker.rpc import Server, connect
from stoker.v1 import checkpoint_store_pb2, controller_pb2, model_pb2, session_pb2
from stoker.v1.checkpoint_store_pb2_grpc import CheckpointStoreStub
from stoker.v1.controller_pb2_grpc import ControllerServicer, add_ControllerServicer_to_server
from stoker.v1.node_agent_pb2 import (
    REPLICA_STATE_FAILED,
    REPLICA_STATE_READY,
    NodeReport,
    Replica,
    StartReplicaRequest,
    StopReplicaRequest,
)
from stoker.v1.node_agent_pb2_grpc import NodeAgentStub
from tests.integration.node_agent.processes import ServiceProcess

MIB = 1 << 20
LONG_TOKENS = 12_000
"""Of an answer that does not end while a test looks at it."""
PATIENCE_SECONDS = 90
"""How long a worker may take to start where several test runs share two cores."""


class Listener(ControllerServicer):
    """The controller's end of the reports: answers each, keeps the latest."""

    def __init__(self) -> None:
        self.latest = NodeReport()
        self.fence = 1
        self._news = asyncio.Condition()

    async def ReportNode(  # noqa: N802 - the name of the rpc
        self, request_iterator: AsyncIterator[NodeReport], context: Any
    ) -> AsyncIterator[controller_pb2.ReportAck]:
        """Keep each report."""
        async for report in request_iterator:
            async with self._news:
                self.latest = report
                self._news.notify_all()
            yield controller_pb2.ReportAck(sequence=report.sequence, fence=self.fence)

    async def until(self, holds: Callable[[NodeReport], bool]) -> NodeReport:
        """Return the first report of which this holds."""
        async with asyncio.timeout(PATIENCE_SECONDS), self._news:
            await self._news.wait_for(lambda: holds(self.latest))
            return self.latest

    async def replica(self, replica_id: str, state: int) -> Replica:
        """Return a replica once it is in a state; an unexpected failure ends the wait."""

        def find(report: NodeReport) -> Replica | None:
            for replica in report.replicas:
                if replica.replica_id == replica_id:
                    if replica.state == REPLICA_STATE_FAILED and state == REPLICA_STATE_READY:
                        raise AssertionError(f"{replica.error_code}: {replica.error_message}")
                    return replica if replica.state == state else None
            return None

        report = await self.until(lambda report: find(report) is not None)
        found = find(report)
        assert found is not None
        return found


class OneNode:
    """A store and an agent."""

    def __init__(self, folder: Path, **agent_settings: Any) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.listener = Listener()
        self._agent_settings = agent_settings
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()  # a start that failed half-way leaves nothing running
            raise
        return self

    async def _open(self) -> None:
        server = Server(["stoker.v1.Controller"])
        add_ControllerServicer_to_server(self.listener, server.grpc_server)
        controller_port = server.bind("127.0.0.1:0")
        await server.start()
        self._stack.push_async_callback(server.stop)
        store_address = f"unix:{self.run_dir}/store.sock"
        self.run_dir.mkdir()
        self.store = await self._stack.enter_async_context(
            ServiceProcess(
                "store", address=store_address, run_dir=self.run_dir, pool_bytes=64 * MIB, chunk_bytes=MIB
            )
        )
        settings = {
            "address": "127.0.0.1:0",
            "node_id": "node-under-test",
            "store": store_address,
            "attach_socket": self.run_dir / "attach.sock",
            "run_dir": self.run_dir,
            "log_dir": self.folder / "logs",
            "controllers": [f"127.0.0.1:{controller_port}"],
            "use_gpus": False,
            "worker_threads": 1,
            "pool_niceness": 0,
            "drain_seconds": 5,
        }
        self.agent = await self._stack.enter_async_context(
            ServiceProcess("node_agent", **(settings | self._agent_settings))
        )
        address = (await self.agent.wait_for_log("agent.listening"))["address"]
        self.stub = NodeAgentStub(await self._stack.enter_async_context(connect(address)))
        self.store_stub = CheckpointStoreStub(await self._stack.enter_async_context(connect(store_address)))

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def start_replica(self, replica_id: str, model: Path, *, device: int = 0, **order: Any) -> None:
        """Order a replica of the checkpoint in a folder."""
        await self.order(replica_id, await self.describe(model), device=device, **order)

    async def describe(self, model: Path) -> model_pb2.CheckpointInfo:
        """Return what the store says of a checkpoint."""
        return await self.store_stub.Describe(checkpoint_store_pb2.DescribeRequest(uri=str(model)))

    async def order(
        self, replica_id: str, info: model_pb2.CheckpointInfo, *, device: int = 0, **order: Any
    ) -> None:
        """Order a replica of a checkpoint."""
        spec = model_pb2.ModelSpec(name="tiny", checkpoint_uri=info.uri, engine="transformers", dtype="auto")
        fields: dict[str, Any] = {"placement_seconds": 0.001, "fence": 1} | order
        await self.stub.StartReplica(
            StartReplicaRequest(replica_id=replica_id, spec=spec, checkpoint=info, devices=[device], **fields)
        )

    async def stop_replica(self, replica_id: str, **order: Any) -> None:
        """Order it gone and wait until it is."""
        await self.stub.StopReplica(
            StopReplicaRequest(replica_id=replica_id, **({"fence": 1, "reason": "test"} | order))
        )
        await self.listener.until(
            lambda report: all(replica.replica_id != replica_id for replica in report.replicas)
        )


_SESSIONS = itertools.count(1)


def request(
    replica_id: str, prompt: list[int], *, session_id: str = "", max_tokens: int = 16, **sampling: Any
) -> session_pb2.GenerateRequest:
    """Return a greedy request; a session of its own unless it is named."""
    return session_pb2.GenerateRequest(
        model="tiny",
        replica_id=replica_id,
        session_id=session_id or f"ses-{next(_SESSIONS)}",
        epoch=1,
        prompt_token_ids=prompt,
        sampling=session_pb2.Sampling(seed=1, max_tokens=max_tokens, **sampling),
    )
