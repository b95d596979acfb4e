"""What goes on while others are away: controllers, stores, and time itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from stoker.v1 import session_pb2
from tests.integration.gateway.fake_cluster import FakeCluster
from tests.integration.gateway.gateway_process import GatewayProcess

CHAT = "/v1/chat/completions"


def body(model: str = "tiny", content: str = "hi") -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": content}]}


async def test_warm_requests_go_on_without_a_controller_and_cold_ones_say_so(tmp_path: Path) -> None:
    async with FakeCluster() as cluster:
        cluster.controller.push(cluster.route("tiny"))
        cluster.controller.push(cluster.route("cold", ready=False))
        async with (
            GatewayProcess(cluster.controller_address, tmp_path, controller_patience_seconds=0.3) as process,
            httpx.AsyncClient(base_url=process.url, timeout=30) as http,
        ):
            await process.wait_for_log("routes.synced")
            await cluster.stop_controller()
            await process.wait_for_log("routes.lost")
            warm, cold = await http.post(CHAT, json=body()), await http.post(CHAT, json=body("cold"))
            ready = await http.get("/readyz")

    assert (warm.status_code, cold.status_code, ready.status_code) == (200, 503, 200)
    assert "no controller answers" in cold.json()["error"]["message"]


async def test_a_second_controller_is_asked_when_the_first_is_away(tmp_path: Path) -> None:
    async with FakeCluster() as cluster:
        cluster.controller.push(cluster.route("cold", ready=False))
        cluster.controller.may_start.set()
        addresses = f'["127.0.0.1:9", "{cluster.controller_address}"]'
        async with (
            GatewayProcess("", tmp_path, controllers=addresses) as process,
            httpx.AsyncClient(base_url=process.url, timeout=30) as http,
        ):
            await process.wait_for_log("routes.synced")
            answer = await http.post(CHAT, json=body("cold"))

    assert answer.status_code == 200


async def test_a_cold_request_whose_controller_dies_is_asked_of_the_next_one(tmp_path: Path) -> None:
    async with FakeCluster() as first, FakeCluster() as second:
        for cluster in (first, second):
            cluster.controller.push(cluster.route("cold", ready=False))
        second.controller.may_start.set()
        addresses = f'["{first.controller_address}", "{second.controller_address}"]'
        async with (
            GatewayProcess("", tmp_path, controllers=addresses) as process,
            httpx.AsyncClient(base_url=process.url, timeout=30) as http,
        ):
            await process.wait_for_log("routes.synced")
            waiting = asyncio.create_task(http.post(CHAT, json=body("cold")))
            while not first.controller.acquired:  # noqa: ASYNC110 - the fake keeps a list, no event
                await asyncio.sleep(0.01)
            await first.stop_controller()
            answer = await waiting

    assert answer.status_code == 200
    assert len(second.controller.acquired) == 1


async def test_a_restarted_gateway_finds_its_tokenizers_on_disk(tmp_path: Path) -> None:
    async with FakeCluster() as cluster:
        cluster.controller.push(cluster.route("tiny"))
        statuses = []
        for _ in range(2):
            async with (
                GatewayProcess(cluster.controller_address, tmp_path) as process,
                httpx.AsyncClient(base_url=process.url, timeout=30) as http,
            ):
                await process.wait_for_log("routes.synced")
                statuses.append((await http.post(CHAT, json=body())).status_code)

    assert statuses == [200, 200]
    assert cluster.store.reads == 1


async def test_an_unusable_tokenizer_is_a_clear_refusal(tmp_path: Path) -> None:
    async with FakeCluster() as cluster:
        route = cluster.route("broken")
        cluster.store.files["/models/broken"] = {"config.json": b"{}"}
        cluster.controller.push(route)
        async with (
            GatewayProcess(cluster.controller_address, tmp_path) as process,
            httpx.AsyncClient(base_url=process.url, timeout=30) as http,
        ):
            await process.wait_for_log("routes.synced")
            answer = await http.post(CHAT, json=body("broken"))

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "checkpoint_invalid")
    assert "tokenizer.json" in answer.json()["error"]["message"]


async def test_a_request_that_takes_too_long_is_ended_with_504(tmp_path: Path) -> None:
    async def silence(_: session_pb2.GenerateRequest) -> AsyncIterator[session_pb2.GenerateEvent]:
        await asyncio.Event().wait()
        yield session_pb2.GenerateEvent()

    async with FakeCluster() as cluster:
        cluster.controller.push(cluster.route("tiny"))
        cluster.agent.script = silence
        async with (
            GatewayProcess(cluster.controller_address, tmp_path, request_timeout_seconds=1) as process,
            httpx.AsyncClient(base_url=process.url, timeout=30) as http,
        ):
            await process.wait_for_log("routes.synced")
            whole = await http.post(CHAT, json=body())
            async with http.stream("POST", CHAT, json=body() | {"stream": True}) as stream:
                text = "".join([piece async for piece in stream.aiter_text()])

    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert text.startswith(": stoker model=tiny")  # a warm stream that is silent is kept alive, too
    assert '"code": "deadline_exceeded"' in text
