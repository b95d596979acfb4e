"""gRPC as every process uses it: typed errors, deadlines, health, reflection, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from stoker import log, rpc
from stoker.errors import (
    ConfigError,
    DeadlineExceeded,
    ModelNotFound,
    NotFound,
    PeerError,
    QueueFull,
    StokerError,
)
from stoker.v1 import controller_pb2 as pb
from stoker.v1 import controller_pb2_grpc, node_agent_pb2

NAME = "stoker.v1.Controller"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LONG_SECONDS = 60


class Kitchen(controller_pb2_grpc.ControllerServicer):
    """A service that fails the way it is told, or waits until it is released."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.entered, self.release, self.left = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.remaining_seconds: float | None = None

    async def GetClusterStatus(self, request: Any, context: Any) -> pb.ClusterStatus:  # noqa: N802 - named by the proto
        """Fail, or tell how long the caller would wait."""
        self.remaining_seconds = context.time_remaining()
        if self.error:
            raise self.error
        return pb.ClusterStatus(leader="me")

    async def ListNodes(self, request: Any, context: Any) -> pb.ListNodesResponse:  # noqa: N802 - named by the proto
        """Answer once released."""
        self.entered.set()
        await self.release.wait()
        return pb.ListNodesResponse()

    async def Acquire(self, request: Any, context: Any) -> AsyncIterator[pb.AcquireEvent]:  # noqa: N802 - named by the proto
        """Say something, then fail or wait."""
        try:
            yield pb.AcquireEvent(queued=pb.AcquireQueued(reason="soon"))
            if self.error:
                raise self.error
            await self.release.wait()
        finally:
            self.left.set()

    async def ReportNode(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.ReportAck]:  # noqa: N802 - named by the proto
        """Acknowledge each report, then fail."""
        async for report in request_iterator:
            yield pb.ReportAck(sequence=report.sequence)
        if self.error:
            raise self.error


class Served:
    """A kitchen behind a real server, and a client of it."""

    def __init__(self, kitchen: Kitchen, server: rpc.Server, channel: grpc.aio.Channel) -> None:
        self.kitchen, self.server, self.channel = kitchen, server, channel
        self.stub = controller_pb2_grpc.ControllerStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    async def status_error(self, error: Exception) -> StokerError:
        """Return what a unary call raises when the handler raises `error`."""
        self.kitchen.error = error
        with pytest.raises(StokerError) as caught, rpc.translated("the kitchen"):
            await self.stub.GetClusterStatus(pb.GetClusterStatusRequest())
        return caught.value


@asynccontextmanager
async def serve() -> AsyncIterator[Served]:
    kitchen = Kitchen()  # type: ignore[abstract]  # what nobody calls here is left out
    server = rpc.Server([NAME])
    controller_pb2_grpc.add_ControllerServicer_to_server(kitchen, server.grpc_server)
    port = server.bind("127.0.0.1:0")
    await server.start()
    try:
        async with rpc.connect(f"127.0.0.1:{port}") as channel:
            yield Served(kitchen, server, channel)
    finally:
        await server.stop()


async def test_an_error_arrives_as_the_class_that_was_raised_with_all_its_fields() -> None:
    raised = QueueFull(
        "tiny's queue is full: réessayez", retry_after_seconds=1.5, param="model", details={"queued": 8}
    )
    async with serve() as served:
        caught = await served.status_error(raised)

    assert type(caught) is QueueFull
    assert (caught.message, caught.retry_after_seconds, caught.param, caught.details) == (
        "tiny's queue is full: réessayez",
        1.5,
        "model",
        {"queued": 8},
    )


async def test_a_client_without_our_library_reads_the_status_and_the_message() -> None:
    async with serve() as served:
        served.kitchen.error = ModelNotFound("no model 'x'")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.stub.GetClusterStatus(pb.GetClusterStatusRequest())

    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "no model 'x'")


async def test_an_error_in_the_middle_of_a_stream_arrives_after_what_was_sent() -> None:
    async with serve() as served:
        served.kitchen.error = ModelNotFound("deleted meanwhile")
        call = served.stub.Acquire(pb.AcquireRequest())
        first = await call.read()
        with pytest.raises(ModelNotFound, match="deleted meanwhile"), rpc.translated("the kitchen"):
            await call.read()

    assert first == pb.AcquireEvent(queued=pb.AcquireQueued(reason="soon"))


async def test_an_error_ends_a_stream_in_both_directions() -> None:
    async with serve() as served:
        served.kitchen.error = NotFound("not a node")
        call = served.stub.ReportNode()
        await call.write(node_agent_pb2.NodeReport(sequence=7))
        ack = await call.read()
        await call.done_writing()
        with pytest.raises(NotFound, match="not a node"), rpc.translated("the kitchen"):
            await call.read()

    assert ack == pb.ReportAck(sequence=7)


@pytest.mark.parametrize("letter", ["e", "é", "\x1b", "😀", "\ud800"])
@pytest.mark.parametrize("length", [600, 1_000, 100_000])
async def test_a_long_message_still_arrives_as_its_class(letter: str, length: int) -> None:
    """A log's tail in a message must not turn one error into another: gRPC limits metadata to 8 kB."""
    async with serve() as served:
        caught = await served.status_error(ModelNotFound(letter * length, details={"tail": letter * length}))

    assert type(caught) is ModelNotFound
    assert caught.message.startswith("?" if letter == "\ud800" else letter * 60)


async def test_a_crash_is_an_internal_error_to_the_caller_and_a_trace_in_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.configure("kitchen", json=True)
    async with serve() as served:
        caught = await served.status_error(ZeroDivisionError("by zero"))

    assert type(caught) is StokerError
    assert caught.message == f"/{NAME}/GetClusterStatus failed inside: ZeroDivisionError: by zero"
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["method"]) == ("rpc.crashed", f"/{NAME}/GetClusterStatus")
    assert "ZeroDivisionError: by zero" in line["exception"]


async def test_a_caller_that_leaves_a_stream_ends_its_handler() -> None:
    async with serve() as served:
        call = served.stub.Acquire(pb.AcquireRequest())
        await call.read()
        call.cancel()

        await asyncio.wait_for(served.kitchen.left.wait(), LONG_SECONDS)


async def test_a_call_without_a_deadline_gets_the_default_one() -> None:
    async with serve() as served:
        await served.stub.GetClusterStatus(pb.GetClusterStatusRequest())

    assert served.kitchen.remaining_seconds is not None
    assert 0 < served.kitchen.remaining_seconds <= rpc.DEFAULT_DEADLINE_SECONDS


async def test_a_call_keeps_the_deadline_it_came_with() -> None:
    async with serve() as served:
        await served.stub.GetClusterStatus(pb.GetClusterStatusRequest(), timeout=1000)

    assert served.kitchen.remaining_seconds is not None
    assert served.kitchen.remaining_seconds > rpc.DEFAULT_DEADLINE_SECONDS


async def test_a_peer_that_does_not_answer_in_time_is_named() -> None:
    async with serve() as served:
        with (
            pytest.raises(DeadlineExceeded, match="node agent n1 did not answer"),
            rpc.translated("node agent n1"),
        ):
            await served.stub.ListNodes(pb.ListNodesRequest(), timeout=0.05)


async def test_a_peer_that_is_not_there_is_named(unused_tcp_port: int) -> None:
    async with rpc.connect(f"127.0.0.1:{unused_tcp_port}") as channel:
        stub = controller_pb2_grpc.ControllerStub(channel)
        with pytest.raises(PeerError, match="store n1 cannot be reached"), rpc.translated("store n1"):
            await stub.GetClusterStatus(pb.GetClusterStatusRequest())


async def test_a_taken_port_is_refused_with_what_to_do() -> None:
    first = rpc.Server([NAME])
    port = first.bind("127.0.0.1:0")
    await first.start()
    second = rpc.Server([NAME])

    with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}: is the port taken"):
        second.bind(f"127.0.0.1:{port}")

    await first.stop()
    await second.stop()


async def test_health_is_known_for_the_server_and_each_of_its_services() -> None:
    async with serve() as served:
        answers = [
            await served.health.Check(health_pb2.HealthCheckRequest(service=name)) for name in ("", NAME)
        ]

    assert [answer.status for answer in answers] == [SERVING, SERVING]


async def test_health_turns_not_serving_while_running_calls_end() -> None:
    async with serve() as served:
        watch = served.health.Watch(health_pb2.HealthCheckRequest(service=NAME))
        before = await watch.read()
        running = asyncio.ensure_future(served.stub.ListNodes(pb.ListNodesRequest()))
        await served.kitchen.entered.wait()

        stopping = asyncio.create_task(served.server.stop(grace_seconds=LONG_SECONDS))
        after = await watch.read()
        served.kitchen.release.set()

        assert (before.status, after.status) == (SERVING, NOT_SERVING)
        assert await running == pb.ListNodesResponse()
        watch.cancel()
        await stopping


async def test_reflection_lists_the_services() -> None:
    async def asked() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async with serve() as served:
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        answers = [answer async for answer in stub.ServerReflectionInfo(asked())]

    listed = {service.name for service in answers[0].list_services_response.service}
    assert listed == {NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b"\xff", b'{"code": 1}'])
async def test_a_foreign_error_entry_is_not_a_crash_of_the_client(raw: bytes) -> None:
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata((rpc.ERROR_KEY, raw)), "odd"
    )

    assert type(rpc.from_rpc_error(error, "peer p")) is StokerError
