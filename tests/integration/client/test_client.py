"""Both clients against a gateway and a controller that say what they are told; over real sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from stoker import rpc
from stoker.client import AsyncClient, Client
from stoker.errors import AlreadyExists, InvalidRequest, ModelNotFound, PeerError, QueueFull, StokerError
from stoker.v1 import (
    controller_pb2,
    controller_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    node_agent_pb2,
    node_agent_pb2_grpc,
)

LIMIT_SECONDS = 20


class FakeCluster(
    inference_pb2_grpc.InferenceServicer,
    controller_pb2_grpc.ControllerServicer,
    node_agent_pb2_grpc.NodeAgentServicer,
):
    """Gateway, controller and node agent in one: answers, fails with `error`, remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.sent: dict[str, Any] = {}
        self.error: StokerError | None = None
        self.left = threading.Event()

    async def Chat(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.TextEvent]:  # noqa: N802 - named by the proto
        """Say two words, one event each; wait for ever for the model `endless`."""
        self.asked.append(request)
        self.sent = dict(context.invocation_metadata())
        try:
            for word in ("Hello", " there"):
                yield inference_pb2.TextEvent(text=word)
            if request.model == "endless":
                await asyncio.Event().wait()
            if self.error:
                raise self.error
        finally:
            self.left.set()

    async def Complete(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.TextEvent]:  # noqa: N802 - named by the proto
        """Repeat the prompt."""
        self.asked.append(request)
        self.sent = dict(context.invocation_metadata())
        yield inference_pb2.TextEvent(text=request.prompt)

    async def Deploy(self, request: Any, context: Any) -> controller_pb2.DeployResponse:  # noqa: N802 - named by the proto
        """Deploy it, or fail."""
        self.asked.append(request)
        if self.error:
            raise self.error
        return controller_pb2.DeployResponse(model=model_pb2.Model(spec=request.spec), created=True)

    async def DeleteModel(self, request: Any, context: Any) -> controller_pb2.DeleteModelResponse:  # noqa: N802 - named by the proto
        """Delete it, or fail."""
        self.asked.append(request)
        if self.error:
            raise self.error
        return controller_pb2.DeleteModelResponse()

    async def ListModels(self, request: Any, context: Any) -> controller_pb2.ListModelsResponse:  # noqa: N802 - named by the proto
        """Name two models."""
        specs = [model_pb2.ModelSpec(name=name) for name in ("a", "b")]
        return controller_pb2.ListModelsResponse(models=[model_pb2.Model(spec=spec) for spec in specs])

    async def Acquire(self, request: Any, context: Any) -> AsyncIterator[controller_pb2.AcquireEvent]:  # noqa: N802 - named by the proto
        """Start it at once."""
        self.asked.append(request)
        yield controller_pb2.AcquireEvent(starting=controller_pb2.AcquireStarting(replica_id="r1"))
        yield controller_pb2.AcquireEvent(ready=controller_pb2.AcquireReady())

    async def ReadLogs(self, request: Any, context: Any) -> AsyncIterator[node_agent_pb2.LogLine]:  # noqa: N802 - named by the proto
        """Print two lines."""
        self.asked.append(request)
        for text in ("one", "two"):
            yield node_agent_pb2.LogLine(text=text)


class Running:
    """The fake cluster on a loop and thread of its own, so that a blocking client can call it."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()  # type: ignore[abstract]  # what nobody calls here is left out
        self.address = ""
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="fake-cluster")

    def start(self) -> None:
        """Return when it serves."""
        self._thread.start()
        self._started.result(LIMIT_SECONDS)

    def stop(self) -> None:
        """Return when it has ended."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(LIMIT_SECONDS)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = rpc.Server([])
        inference_pb2_grpc.add_InferenceServicer_to_server(self.cluster, server.grpc_server)
        controller_pb2_grpc.add_ControllerServicer_to_server(self.cluster, server.grpc_server)
        node_agent_pb2_grpc.add_NodeAgentServicer_to_server(self.cluster, server.grpc_server)
        self.address = f"127.0.0.1:{server.bind('127.0.0.1:0')}"
        await server.start()
        self._started.set_result(None)
        await self._stop.wait()
        await server.stop()


@pytest.fixture
def running() -> Iterator[Running]:
    """Run a fake cluster."""
    found = Running()
    found.start()
    yield found
    found.stop()


@pytest.fixture
async def client(running: Running) -> AsyncIterator[AsyncClient]:
    """Return an asynchronous client of it."""
    async with AsyncClient(gateway=running.address, controller=running.address) as opened:
        yield opened


@pytest.fixture
def blocking(running: Running) -> Iterator[Client]:
    """Return a blocking client of it."""
    with Client(gateway=running.address, controller=running.address) as opened:
        yield opened


async def test_chat_yields_events_and_sends_messages_and_sampling(
    client: AsyncClient, running: Running
) -> None:
    words = [
        event.text async for event in client.chat("tiny", [("user", "Hi")], temperature=0.0, max_tokens=2)
    ]

    assert words == ["Hello", " there"]
    assert running.cluster.asked == [
        inference_pb2.ChatRequest(
            model="tiny",
            messages=[inference_pb2.ChatMessage(role="user", content="Hi")],
            sampling=inference_pb2.TextSampling(temperature=0.0, max_tokens=2),
        )
    ]


async def test_sampling_that_was_not_given_is_left_to_the_gateway(
    client: AsyncClient, running: Running
) -> None:
    assert [event.text async for event in client.complete("tiny", "Once")] == ["Once"]

    assert not running.cluster.asked[0].sampling.HasField("temperature")


async def test_a_key_and_the_last_event_are_sent_beside_the_request(
    client: AsyncClient, blocking: Client, running: Running
) -> None:
    again = {"idempotency_key": "k1", "last_event_id": "01234567:2"}
    sent = []
    assert [event async for event in client.chat("tiny", [("user", "Hi")], **again)]
    sent.append(running.cluster.sent)
    assert await asyncio.to_thread(lambda: list(blocking.complete("tiny", "Once", **again)))
    sent.append(running.cluster.sent)

    assert [(each["idempotency-key"], each["last-event-id"]) for each in sent] == [("k1", "01234567:2")] * 2
    assert running.cluster.asked[1] == inference_pb2.CompleteRequest(
        model="tiny", prompt="Once", sampling=inference_pb2.TextSampling()
    )


@pytest.mark.parametrize("key", ["käse", "a\nb"])
async def test_a_key_that_cannot_be_sent_is_refused_before_anything_is(
    client: AsyncClient, running: Running, key: str
) -> None:
    with pytest.raises(InvalidRequest, match="idempotency-key"):
        await anext(client.chat("tiny", [], idempotency_key=key))

    assert running.cluster.asked == []


async def test_a_sampling_field_nobody_knows_is_refused_before_anything_is_sent(
    client: AsyncClient, running: Running
) -> None:
    with pytest.raises(ValueError, match="temprature"):
        await anext(client.chat("tiny", [], temprature=1.0))

    assert running.cluster.asked == []


async def test_an_error_of_the_gateway_keeps_its_class_in_the_middle_of_an_answer(
    client: AsyncClient, running: Running
) -> None:
    running.cluster.error = QueueFull("tiny's queue is full", retry_after_seconds=2.0)
    events = client.chat("tiny", [("user", "Hi")])
    words = [(await anext(events)).text, (await anext(events)).text]

    with pytest.raises(QueueFull, match="tiny's queue") as caught:
        await anext(events)

    assert (words, caught.value.retry_after_seconds) == (["Hello", " there"], 2.0)


async def test_leaving_an_answer_ends_it_at_the_gateway(client: AsyncClient, running: Running) -> None:
    events = client.chat("endless", [("user", "Hi")])
    await anext(events)

    await events.aclose()

    assert await asyncio.to_thread(running.cluster.left.wait, LIMIT_SECONDS)


async def test_an_error_of_the_controller_keeps_its_class(client: AsyncClient, running: Running) -> None:
    running.cluster.error = AlreadyExists("tiny exists")

    with pytest.raises(AlreadyExists, match="tiny exists"):
        await client.deploy(model_pb2.ModelSpec(name="tiny"), create_only=True)

    assert running.cluster.asked[0].create_only


async def test_a_cluster_that_is_not_there_is_named(unused_tcp_port: int) -> None:
    nowhere = f"127.0.0.1:{unused_tcp_port}"
    async with AsyncClient(gateway=nowhere, controller=nowhere) as client:
        with pytest.raises(PeerError, match=f"controller {nowhere} cannot be reached"):
            await client.models()
        with pytest.raises(PeerError, match=f"gateway {nowhere} cannot be reached"):
            await anext(client.chat("tiny", []))


async def test_acquire_yields_progress_until_ready(client: AsyncClient) -> None:
    events = [event.WhichOneof("event") async for event in client.acquire("tiny", timeout_seconds=9)]

    assert events == ["starting", "ready"]


async def test_logs_come_from_the_node_agent_itself(client: AsyncClient, running: Running) -> None:
    lines = [line async for line in client.logs(running.address, "r1", tail_lines=2, follow=False)]

    assert lines == ["one", "two"]
    assert running.cluster.asked == [node_agent_pb2.ReadLogsRequest(replica_id="r1", tail_lines=2)]


def test_the_blocking_client_iterates_over_an_answer(blocking: Client) -> None:
    words = [event.text for event in blocking.chat("tiny", [("user", "Hi")])]

    assert words + [event.text for event in blocking.complete("tiny", "!")] == ["Hello", " there", "!"]


def test_the_blocking_client_raises_what_the_asynchronous_one_does(
    blocking: Client, running: Running
) -> None:
    running.cluster.error = ModelNotFound("no model 'x'")

    with pytest.raises(ModelNotFound, match="no model 'x'"):
        blocking.delete("x")


def test_leaving_a_blocking_answer_ends_it_at_the_gateway(blocking: Client, running: Running) -> None:
    for _ in blocking.chat("endless", [("user", "Hi")]):
        break

    assert running.cluster.left.wait(LIMIT_SECONDS)


def test_the_blocking_client_administers(blocking: Client) -> None:
    deployed = blocking.deploy(model_pb2.ModelSpec(name="tiny"))

    assert (deployed.model.spec.name, deployed.created) == ("tiny", True)
    assert [model.spec.name for model in blocking.models()] == ["a", "b"]


def test_an_answer_that_is_still_open_does_not_keep_the_client_from_closing(running: Running) -> None:
    client = Client(gateway=running.address, controller=running.address)
    answer = client.chat("endless", [("user", "Hi")])
    next(answer)

    client.close()

    with pytest.raises(StokerError, match="closed before the answer was over"):
        next(answer)
