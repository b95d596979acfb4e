"""A real controller process, and a node (agent and store) that the test drives: no workers, no weights."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import psutil

from stoker.cli.free_ports import free_ports
from stoker.errors import CheckpointInvalid, Fenced, LoadFailed, PeerError, ReplicaBusy, StokerError
from stoker.rpc import Server, connect, translated
from stoker.v1 import (
    checkpoint_store_pb2,
    checkpoint_store_pb2_grpc,
    controller_pb2,
    controller_pb2_grpc,
    model_pb2,
    node_agent_pb2,
    node_agent_pb2_grpc,
    start_pb2,
)
from tests.integration.forked_services import ForkedProcess, fork

PATIENCE_SECONDS = 60.0
"""Ends what would hang; passing tests never come near, on slow machines neither."""

ACK_SECONDS = 3.0
REFUSED_SECONDS = 0.1
"""Between two tries to report to a controller that doesn't lead, or isn't there."""


class ControllerProcess:
    """`python -m services.controller` in a process of its own."""

    def __init__(self, folder: Path, state: str, **settings: float | str) -> None:
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self._folder = folder
        self._environment = {
            **os.environ,
            "STOKER_CONTROLLER_ADDRESS": self.address,
            "STOKER_CONTROLLER_STATE": state,
            "STOKER_CONTROLLER_DRAIN_SECONDS": "1",
            "STOKER_CONTROLLER_LEADER_TTL_SECONDS": "2",
            "STOKER_CONTROLLER_MINIMUM_RESIDENCY_SECONDS": "0",
            **{f"STOKER_CONTROLLER_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self._process: ForkedProcess | None = None

    def start(self) -> None:
        """Start it; `ready` waits for it."""
        with self.log_path.open("ab") as log:
            self._process = fork("services.controller", environment=self._environment, stderr=log)

    @property
    def log_path(self) -> Path:
        """Where its log goes."""
        return self._folder / f"controller-{self.address.rpartition(':')[2]}.log"

    def log(self, event: str) -> list[dict[str, Any]]:
        """Return what it logged as `event`."""
        lines = [json.loads(line) for line in self.log_path.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def kill(self) -> None:
        """End it as a crash would."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """End it as an operator would; returns its exit status."""
        return self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Stop it where it stands; connections stay open and silent."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        while psutil.Process(self._process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)  # it is nobody's child who could wait for that

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(how)
        status = self._process.wait(timeout=PATIENCE_SECONDS)
        self._process = None
        return status


class FakeNode(node_agent_pb2_grpc.NodeAgentServicer, checkpoint_store_pb2_grpc.CheckpointStoreServicer):
    """A node whose replicas become ready when the test says so; keeps the contracts of agent and store."""

    def __init__(self, node_id: str, *, devices: int = 1) -> None:
        self.node_id = node_id
        self.devices = devices
        self.replicas: dict[str, node_agent_pb2.Replica] = {}
        self.starts: list[str] = []
        self.stops: list[tuple[str, bool, str]] = []
        self.start_times: list[float] = []
        self.auto_ready = True
        self.fail_with: str | None = None
        self.busy: set[str] = set()
        self.requests: dict[str, str] = {}
        self.moved: list[tuple[str, str]] = []
        self.prefetches: list[checkpoint_store_pb2.PrefetchRequest] = []
        self.warm_workers_wanted: set[int] = set()
        self.architectures = ["LlamaForCausalLM"]
        self.file_bytes = 1_000_000
        self.pool_bytes = 1_000_000_000
        self.revision = "r1"
        self._fence = 0
        self._sequence = 0
        self._boot_id = f"boot-{os.urandom(4).hex()}"
        self._changed: set[asyncio.Event] = set()
        self.reachable = asyncio.Event()
        self.reachable.set()
        self._server = Server(["stoker.v1.NodeAgent", "stoker.v1.CheckpointStore"])
        self.address = ""

    # --- NodeAgent ---

    async def StartReplica(self, request: node_agent_pb2.StartReplicaRequest, context: Any) -> Any:  # noqa: N802 - named by the proto
        """Begin a start; idempotent."""
        await self.reachable.wait()
        self._check_fence(request.fence)
        if request.replica_id not in self.replicas:
            self.starts.append(request.replica_id)
            self.start_times.append(time.monotonic())
            taken = {device for replica in self.replicas.values() for device in replica.devices}
            assert not taken & set(request.devices), "a device was given to two replicas"
            self.replicas[request.replica_id] = node_agent_pb2.Replica(
                replica_id=request.replica_id,
                model=request.spec.name,
                revision=request.checkpoint.revision,
                state=node_agent_pb2.REPLICA_STATE_STARTING,
                devices=request.devices,
                max_batch=8,
                max_context_tokens=2048,
            )
            if self.fail_with is not None:
                self.fail(request.replica_id, self.fail_with)
            elif self.auto_ready:
                self.make_ready(request.replica_id)
            self.report()
        return node_agent_pb2.StartReplicaResponse()

    async def StopReplica(self, request: node_agent_pb2.StopReplicaRequest, context: Any) -> Any:  # noqa: N802 - named by the proto
        """Stop unless busy; idempotent."""
        await self.reachable.wait()
        self._check_fence(request.fence)
        if request.only_if_idle and request.replica_id in self.busy:
            raise ReplicaBusy(f"replica {request.replica_id} runs a session")
        self.stops.append((request.replica_id, request.only_if_idle, request.reason))
        if request.to_replica_id:
            self.moved.append((request.replica_id, request.to_replica_id))
        self.replicas.pop(request.replica_id, None)
        self.report()
        return node_agent_pb2.StopReplicaResponse()

    async def MoveSessions(self, request: node_agent_pb2.MoveSessionsRequest, context: Any) -> Any:  # noqa: N802 - named by the proto
        """Take note of where a request's session should go, if it runs here."""
        await self.reachable.wait()
        self._check_fence(request.fence)
        replica_id = self.requests.get(request.request_id, "")
        if not replica_id:
            return node_agent_pb2.MoveSessionsResponse()
        model = self.replicas[replica_id].model
        to = request.to_replica_ids.get(model, "")
        if to:
            self.moved.append((request.request_id, to))
        return node_agent_pb2.MoveSessionsResponse(sessions=int(bool(to)), replica_id=replica_id, model=model)

    def _check_fence(self, fence: int) -> None:
        if fence < self._fence:
            raise Fenced(f"fence {fence} is below {self._fence}")
        self._fence = fence

    # --- CheckpointStore ---

    async def Describe(self, request: checkpoint_store_pb2.DescribeRequest, context: Any) -> Any:  # noqa: N802 - named by the proto
        """Describe whatever is asked for."""
        if request.uri == "/nowhere":
            raise CheckpointInvalid("/nowhere: no such folder")
        return model_pb2.CheckpointInfo(
            uri=request.uri,
            revision=self.revision,
            layout="in_place",
            weight_bytes=self.file_bytes,
            file_bytes=self.file_bytes,
            architecture="GPT2LMHeadModel" if "gpt2" in request.uri else "LlamaForCausalLM",
            dtype="float32",
            layers=2,
        )

    async def Prefetch(self, request: checkpoint_store_pb2.PrefetchRequest, context: Any) -> Any:  # noqa: N802 - named by the proto
        """Take note; nothing is moved."""
        self.prefetches.append(request)
        return checkpoint_store_pb2.PrefetchResponse()

    # --- what the test does to it ---

    def make_ready(self, replica_id: str) -> None:
        """The replica has loaded."""
        replica = self.replicas[replica_id]
        replica.state = node_agent_pb2.REPLICA_STATE_READY
        replica.timings.CopyFrom(
            start_pb2.StartTimings(weights_seconds=0.01, skeleton_seconds=0.02, total_seconds=0.05)
        )
        self.report()

    def fail(self, replica_id: str, message: str) -> None:
        """The replica could not be started."""
        replica = self.replicas[replica_id]
        replica.state = node_agent_pb2.REPLICA_STATE_FAILED
        replica.error_code = LoadFailed.code
        replica.error_message = message
        self.report()

    def report(self) -> None:
        """Something changed: report now."""
        for changed in self._changed:
            changed.set()

    def message(self) -> node_agent_pb2.NodeReport:
        """Return the report as of now."""
        self._sequence += 1
        return node_agent_pb2.NodeReport(
            node_id=self.node_id,
            boot_id=self._boot_id,
            sequence=self._sequence,
            agent_address=self.address,
            store_address=self.address,
            devices=[node_agent_pb2.Device(index=index, kind="cpu") for index in range(self.devices)],
            replicas=list(self.replicas.values()),
            warm_workers=1,
            architectures=self.architectures,
            store=checkpoint_store_pb2.StoreStatus(
                pool=checkpoint_store_pb2.PoolStatus(
                    total_bytes=self.pool_bytes, free_bytes=self.pool_bytes, chunk_bytes=1 << 20
                )
            ),
        )

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[FakeNode, None]:
        """Serve agent and store."""
        node_agent_pb2_grpc.add_NodeAgentServicer_to_server(self, self._server.grpc_server)
        checkpoint_store_pb2_grpc.add_CheckpointStoreServicer_to_server(self, self._server.grpc_server)
        self.address = f"127.0.0.1:{self._server.bind('127.0.0.1:0')}"
        await self._server.start()
        try:
            yield self
        finally:
            await self._server.stop()

    @asynccontextmanager
    async def joined(self, *controllers: str) -> AsyncGenerator[FakeNode, None]:
        """Report to every controller that takes it while the block runs, over restarts.

        An agent asks them in turn; asked at once, one that is paused costs the others no time, and one that
        wakes up still gets reports.
        """
        tasks = [asyncio.create_task(self._report_for_ever(address)) for address in controllers]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _report_for_ever(self, address: str) -> None:
        changed = asyncio.Event()
        self._changed.add(changed)
        while True:
            with suppress(StokerError, TimeoutError):  # INTERNAL, too: a write that meets the end of its call
                async with connect(address) as channel:
                    call = controller_pb2_grpc.ControllerStub(channel).ReportNode()
                    with translated("controller"):
                        await self._report_to(call, changed)
            await asyncio.sleep(REFUSED_SECONDS)

    async def _report_to(self, call: grpc.aio.StreamStreamCall[Any, Any], changed: asyncio.Event) -> None:
        while True:
            changed.clear()
            await self.reachable.wait()
            async with asyncio.timeout(ACK_SECONDS):  # a paused controller is silent
                with suppress(asyncio.InvalidStateError):  # it ended: reading says why
                    await call.write(self.message())
                ack = await call.read()
                if ack is grpc.aio.EOF:
                    return
                if ack.HasField("warm_workers"):
                    self.warm_workers_wanted.add(ack.warm_workers)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):  # `wait_for` may swallow a cancellation
                    await changed.wait()


class Client:
    """Calls to a controller, as a gateway or the CLI makes them."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = controller_pb2_grpc.ControllerStub(channel)

    async def deploy(self, name: str, uri: str = "/models/a", **spec: Any) -> controller_pb2.DeployResponse:
        """Deploy a model."""
        request = controller_pb2.DeployRequest(
            spec=model_pb2.ModelSpec(name=name, checkpoint_uri=uri, **spec)
        )
        with translated("controller"):
            return await self.stub.Deploy(request)

    async def acquire(self, name: str, **fields: Any) -> controller_pb2.AcquireReady:
        """Wait for a replica as a gateway does, without asking again."""
        request = controller_pb2.AcquireRequest(model=name, **fields)
        with translated("controller"):
            async for event in self.stub.Acquire(request, timeout=PATIENCE_SECONDS):
                if event.HasField("ready"):
                    return event.ready
        raise AssertionError("Acquire ended without ready")

    async def models(self) -> dict[str, model_pb2.Model]:
        """Return the listed models by name."""
        with translated("controller"):
            listed = await self.stub.ListModels(controller_pb2.ListModelsRequest())
        return {model.spec.name: model for model in listed.models}


async def until(claim: Callable[[], Any], *, pause_seconds: float = 0.02) -> None:
    """Wait until a claim holds, looking again after each pause; fail when it never does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            value = claim()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return
        except PeerError:
            pass
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(pause_seconds)
