"""Cold models and failing replicas, through the real gateway."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

from stoker.errors import CannotMeetDeadline, CapacityError, LoadFailed, QueueFull, ReplicaGone, WorkerDied
from tests.integration.gateway.fake_cluster import FakeCluster, fails_after, says_for_ever
from tests.integration.gateway.gateway_process import GatewayProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

MESSAGES = [{"role": "user", "content": "hi"}]


def body(model: str, **fields: object) -> dict[str, object]:
    return {"model": model, "messages": MESSAGES, "stream": True, **fields}


async def test_a_cold_request_gets_headers_and_comments_until_its_model_is_ready(
    cluster: FakeCluster, gateway: GatewayProcess
) -> None:
    cluster.controller.push(cluster.route("cold-1", ready=False))
    lines = []
    async with (
        httpx.AsyncClient(timeout=30) as http,
        http.stream("POST", f"{gateway.url}/v1/chat/completions", json=body("cold-1")) as response,
    ):
        assert response.status_code == 200
        request_id = response.headers["x-request-id"]
        async for line in response.aiter_lines():
            lines.append(line)
            if line.startswith(":") and "state=starting" in line:
                cluster.controller.may_start.set()
        trace = (await http.get(f"{gateway.url}/api/v1/requests/{request_id}")).json()

    comments = [line for line in lines if line.startswith(":")]
    assert comments[0] == ": stoker model=cold-1 state=acquiring"
    assert any("state=starting" in comment and "loaded=25%" in comment for comment in comments)
    assert lines[-2] == "data: [DONE]"
    assert trace["start"]["weights_seconds"] == 0.5
    assert trace["acquire_seconds"] > 0
    assert trace["first_token_seconds"] >= trace["acquire_seconds"]
    assert cluster.agent.orders[-1].waited_seconds >= trace["acquire_seconds"]  # it is no newcomer there
    assert trace["replica_ids"] == ["rep-cold"]
    assert trace["finish"] == "stop"


async def test_the_openai_client_ignores_the_comments(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.controller.push(cluster.route("cold-2", ready=False))
    stream = await client.chat.completions.create(model="cold-2", messages=MESSAGES, stream=True)
    cluster.controller.may_start.set()

    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello!"


async def test_a_whole_answer_just_waits(cluster: FakeCluster, client: openai.AsyncOpenAI) -> None:
    cluster.controller.push(cluster.route("cold-3", ready=False))
    cluster.controller.may_start.set()
    answer = await client.chat.completions.create(model="cold-3", messages=MESSAGES)

    assert answer.choices[0].message.content == "Hello!"


async def test_a_silent_start_is_bridged_by_comments(cluster: FakeCluster, gateway: GatewayProcess) -> None:
    cluster.controller.push(cluster.route("cold-4", ready=False))
    starting = 0
    async with (
        httpx.AsyncClient(timeout=30) as http,
        http.stream("POST", f"{gateway.url}/v1/chat/completions", json=body("cold-4")) as response,
    ):
        async for line in response.aiter_lines():
            starting += "state=starting" in line
            if starting == 3:  # one event, then the gateway's own keep-alive
                cluster.controller.may_start.set()

    assert starting >= 3


async def test_a_start_that_fails_ends_the_stream_with_an_error(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.controller.push(cluster.route("cold-5", ready=False))
    cluster.controller.acquire_error = LoadFailed("model 'cold-5' cannot be loaded: its shards are torn")
    stream = await client.chat.completions.create(model="cold-5", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="its shards are torn"):
        [chunk async for chunk in stream]


async def test_no_room_answers_503_with_retry_after(cluster: FakeCluster, client: openai.AsyncOpenAI) -> None:
    cluster.controller.push(cluster.route("cold-6", ready=False))
    cluster.controller.acquire_error = CapacityError("no node has room", retry_after_seconds=7.2)
    with pytest.raises(openai.InternalServerError, match="no node has room") as caught:
        await client.chat.completions.create(model="cold-6", messages=MESSAGES)

    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "8"


async def test_a_client_that_leaves_a_cold_request_only_stops_waiting(
    cluster: FakeCluster, gateway: GatewayProcess
) -> None:
    """The controller sees the call end; nobody tells anyone to stop the start."""
    cluster.controller.push(cluster.route("cold-7", ready=False))
    async with (
        httpx.AsyncClient(timeout=30) as http,
        http.stream("POST", f"{gateway.url}/v1/chat/completions", json=body("cold-7")) as response,
    ):
        async for line in response.aiter_lines():
            if "state=starting" in line:
                break

    async with asyncio.timeout(10):
        await cluster.controller.acquires_left.wait()
    await gateway.wait_for_log("request.finished", finish="cancelled", model="cold-7")
    assert cluster.agent.orders == []


async def test_a_client_that_leaves_cancels_its_generation(
    cluster: FakeCluster, gateway: GatewayProcess
) -> None:
    cluster.agent.script = says_for_ever()
    async with (
        httpx.AsyncClient(timeout=30) as http,
        http.stream("POST", f"{gateway.url}/v1/chat/completions", json=body("tiny")) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                break

    async with asyncio.timeout(10):
        await cluster.agent.cancelled.wait()
    await gateway.wait_for_log("request.finished", finish="cancelled", model="tiny")


async def test_a_client_that_leaves_a_whole_answer_cancels_it_too(
    cluster: FakeCluster, gateway: GatewayProcess
) -> None:
    cluster.agent.script = says_for_ever()
    async with httpx.AsyncClient(timeout=0.5) as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.post(f"{gateway.url}/v1/chat/completions", json=body("tiny", stream=False))

    async with asyncio.timeout(10):
        await cluster.agent.cancelled.wait()


async def test_a_worker_that_dies_in_mid_stream_ends_it_with_one_error(
    cluster: FakeCluster, gateway: GatewayProcess
) -> None:
    cluster.agent.script = fails_after("He", WorkerDied("worker w1 was killed"))
    cluster.controller.push(cluster.route("dying-1"))
    async with httpx.AsyncClient(timeout=30) as http:
        answer = await http.post(f"{gateway.url}/v1/chat/completions", json=body("dying-1"))

    events = [line for line in answer.text.split("\n\n") if line.startswith("data:")]
    assert answer.status_code == 200
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, "stream_lost")
    assert "cut off after 2 tokens" in error["message"]
    assert sum('"error"' in event for event in events) == 1


async def test_a_worker_that_dies_in_a_whole_answer_is_a_503(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.agent.script = fails_after("He", WorkerDied("worker w1 was killed"))
    cluster.controller.push(cluster.route("dying-2"))
    with pytest.raises(openai.InternalServerError, match="no replica could go on with it") as caught:
        await client.chat.completions.create(model="dying-2", messages=MESSAGES)

    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) >= 1


async def test_a_replica_that_is_gone_is_replaced_before_the_first_token(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.controller.push(cluster.route("gone"))
    cluster.agent.script = fails_after("", ReplicaGone("not here any more"), times=1)
    cluster.controller.may_start.set()
    answer = await client.chat.completions.create(model="gone", messages=MESSAGES)

    assert answer.choices[0].message.content == "fine"
    assert [order.epoch for order in cluster.agent.orders] == [0, 1]
    assert list(cluster.controller.acquired[0].failed_replica_ids) == ["rep-gone"]


async def test_an_agent_that_cannot_be_reached_is_passed_over(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    route = cluster.route("far")
    route.replicas.insert(0, cluster.replica("rep-dead", agent_address="127.0.0.1:9"))
    cluster.controller.push(route)
    answer = await client.chat.completions.create(model="far", messages=MESSAGES)

    assert answer.choices[0].message.content == "Hello!"


async def test_a_replica_that_keeps_failing_is_given_up(
    cluster: FakeCluster, client: openai.AsyncOpenAI
) -> None:
    cluster.controller.push(cluster.route("broken"))
    cluster.agent.script = fails_after("", WorkerDied("worker w2 was killed"))
    cluster.controller.may_start.set()
    with pytest.raises(openai.InternalServerError, match="worker w2 was killed"):
        await client.chat.completions.create(model="broken", messages=MESSAGES)

    assert len(cluster.agent.orders) == 3


async def test_a_full_queue_answers_429_at_once(cluster: FakeCluster, client: openai.AsyncOpenAI) -> None:
    cluster.controller.push(cluster.route("small", ready=False, max_queue=1))
    with pytest.raises(openai.RateLimitError, match="queue of model 'small' is full") as caught:
        await client.chat.completions.create(model="small", messages=MESSAGES, n=2)

    assert caught.value.response.headers["retry-after"] == "1"


async def test_a_full_worker_answers_429(cluster: FakeCluster, client: openai.AsyncOpenAI) -> None:
    cluster.agent.script = fails_after("", QueueFull("the batch is full"))
    with pytest.raises(openai.RateLimitError, match="the batch is full"):
        await client.chat.completions.create(model="tiny", messages=MESSAGES)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_deadline_that_cannot_be_met_is_refused_at_once_with_the_estimate(
    cluster: FakeCluster, gateway: GatewayProcess, *, stream: bool
) -> None:
    name = f"cold-late-{stream}".lower()
    cluster.controller.push(cluster.route(name, ready=False))
    cluster.controller.acquire_error = CannotMeetDeadline(
        "expected to be ready in 90.00 s", retry_after_seconds=90.0
    )
    try:
        async with httpx.AsyncClient(timeout=30) as http:
            answer = await http.post(
                f"{gateway.url}/v1/chat/completions",
                json=body(name, stream=stream),
                headers={"x-stoker-deadline-seconds": "2.5"},
            )
    finally:
        cluster.controller.acquire_error = None

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "60")
    assert answer.json()["error"] == {
        "message": "expected to be ready in 90.00 s",
        "type": "overloaded_error",
        "param": None,
        "code": "cannot_meet_deadline",
    }
    assert 0 < cluster.controller.acquired[-1].deadline_seconds <= 2.5


async def test_a_deadline_that_is_no_number_is_refused_and_without_one_there_is_none(
    cluster: FakeCluster, gateway: GatewayProcess
) -> None:
    cluster.controller.push(cluster.route("cold-due", ready=False))
    cluster.controller.may_start.set()
    async with httpx.AsyncClient(timeout=30) as http:
        url = f"{gateway.url}/v1/chat/completions"
        refused = await http.post(url, json=body("cold-due"), headers={"x-stoker-deadline-seconds": "soon"})
        await http.post(url, json=body("cold-due"))

    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")
    assert cluster.controller.acquired[-1].deadline_seconds == 0
