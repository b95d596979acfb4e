"""gRPC `stoker.v1.Inference` of the real gateway."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stoker import rpc
from stoker.client import AsyncClient
from stoker.errors import CallerError, IdempotencyKeyReused, InvalidRequest, ModelNotFound, Unauthenticated
from stoker.v1 import inference_pb2, inference_pb2_grpc, session_pb2
from tests.integration.gateway.fake_cluster import FakeCluster, goes_on_with
from tests.integration.gateway.gateway_process import GatewayProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

HI = inference_pb2.ChatMessage(role="user", content="hi")


async def ask(gateway: GatewayProcess, request: inference_pb2.ChatRequest) -> list[inference_pb2.TextEvent]:
    async with rpc.connect(gateway.grpc_address) as channel:
        with rpc.translated("gateway"):
            call = inference_pb2_grpc.InferenceStub(channel).Chat(request, timeout=30)
            return [event async for event in call]


async def test_a_conversation_streams_text_and_ends_with_its_usage(
    cluster: FakeCluster, gateway: GatewayProcess
) -> None:
    events = await ask(gateway, inference_pb2.ChatRequest(model="tiny", messages=[HI]))

    assert "".join(event.text for event in events) == "Hello!"
    assert events[-1].finish_reason == session_pb2.FINISH_REASON_STOP
    assert events[-1].usage.completion_tokens == 7
    assert len({event.request_id for event in events}) == 1


async def test_a_text_is_continued_with_log_probabilities(
    cluster: FakeCluster, gateway: GatewayProcess
) -> None:
    request = inference_pb2.CompleteRequest(
        model="tiny", prompt="x", sampling=inference_pb2.TextSampling(top_logprobs=1, max_tokens=2)
    )
    async with rpc.connect(gateway.grpc_address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Complete(request, timeout=30)
        events = [event async for event in call]

    assert b"".join(token.raw for event in events for token in event.tokens) == b"He"
    assert events[-1].finish_reason == session_pb2.FINISH_REASON_LENGTH


async def test_errors_keep_their_class(cluster: FakeCluster, gateway: GatewayProcess) -> None:
    with pytest.raises(ModelNotFound):
        await ask(gateway, inference_pb2.ChatRequest(model="nobody", messages=[HI]))
    hot = inference_pb2.TextSampling(temperature=9)
    with pytest.raises(CallerError, match="temperature"):
        await ask(gateway, inference_pb2.ChatRequest(model="tiny", messages=[HI], sampling=hot))


async def test_keys_are_asked_for_here_too(cluster: FakeCluster, tmp_path: Path) -> None:
    request = inference_pb2.ListDeployedModelsRequest()
    keys = json.dumps(["secret"])
    async with (
        GatewayProcess(cluster.controller_address, tmp_path, api_keys=keys) as process,
        rpc.connect(process.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(Unauthenticated), rpc.translated("gateway"):
            await stub.ListDeployedModels(request)
        allowed = await stub.ListDeployedModels(request, metadata=(("authorization", "Bearer secret"),))

    assert allowed is not None


async def test_models_are_listed_and_health_is_served(cluster: FakeCluster, gateway: GatewayProcess) -> None:
    async with rpc.connect(gateway.grpc_address) as channel:
        names = await inference_pb2_grpc.InferenceStub(channel).ListDeployedModels(
            inference_pb2.ListDeployedModelsRequest()
        )
        health = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="stoker.v1.Inference")
        )

    assert "tiny" in names.names
    assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_client_with_a_key_goes_on_after_the_last_event_it_got(
    cluster: FakeCluster, gateway: GatewayProcess
) -> None:
    cluster.agent.script = goes_on_with("Hello!", stands_still_at=4)
    async with AsyncClient(gateway=gateway.grpc_address) as client:
        first = client.complete("tiny", "x", idempotency_key="k1")
        text = last_id = ""
        while len(text) < 2:
            event = await anext(first)
            text, last_id = text + event.text, event.event_id
        await first.aclose()
        await cluster.agent.cancelled.wait()
        rest = [
            event async for event in client.complete("tiny", "x", idempotency_key="k1", last_event_id=last_id)
        ]
        whole = [event async for event in client.complete("tiny", "x", idempotency_key="k1")]

    assert "".join(event.text for event in rest) == "Hello!"[len(text) :]
    assert rest[-1].finish_reason == session_pb2.FINISH_REASON_STOP
    assert rest[-1].usage.completion_tokens == 7
    assert len(cluster.agent.orders) == 2  # the third call found all of it
    assert 2 <= len(cluster.agent.orders[1].generated_token_ids) <= 4  # nothing was made twice
    assert "".join(event.text for event in whole) == "Hello!"


async def test_a_key_that_is_used_wrongly_is_refused_as_over_rest(
    cluster: FakeCluster, gateway: GatewayProcess
) -> None:
    async with AsyncClient(gateway=gateway.grpc_address) as client:
        assert [event async for event in client.complete("tiny", "x", idempotency_key="k2")]
        with pytest.raises(IdempotencyKeyReused):
            await anext(client.complete("tiny", "y", idempotency_key="k2"))
        with pytest.raises(InvalidRequest, match="no id of an event"):
            await anext(client.complete("tiny", "x", idempotency_key="k2", last_event_id="12"))
        with pytest.raises(InvalidRequest, match="without Idempotency-Key"):
            await anext(client.complete("tiny", "x", last_event_id="01234567:1"))
