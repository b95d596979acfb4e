"""The REST surface, byte by byte where it matters: errors, limits, probes, administration."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.integration.gateway.fake_cluster import FakeCluster, says_for_ever
from tests.integration.gateway.gateway_process import GatewayProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest_asyncio.fixture(loop_scope="module")
async def http(gateway: GatewayProcess, cluster: FakeCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as opened:
        yield opened


@pytest.mark.parametrize(
    ("path", "content", "status", "code"),
    [
        (CHAT, b"{", 400, "invalid_request"),
        (CHAT, b"[]", 400, "invalid_request"),
        (CHAT, b"", 400, "invalid_request"),
        (CHAT, b'{"model": "tiny"}', 400, "invalid_request"),
        (CHAT, b'{"model": "tiny", "messages": []}', 400, "invalid_request"),
        (CHAT, b'{"model": "tiny", "messages": "hi"}', 400, "invalid_request"),
        (CHAT, b'{"model": "tiny", "messages": [{"role": "user", "content": 7}]}', 400, "invalid_request"),
        (CHAT, b'{"model": "tiny", "messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "invalid_request"),
        (CHAT, b"\xff\xfe", 400, "invalid_request"),
        ("/v1/completions", b'{"model": "tiny", "prompt": [99999]}', 400, "invalid_request"),
        ("/v1/completions", b'{"model": "tiny", "prompt": ""}', 400, "invalid_request"),
        ("/v1/completions", b'{"model": "tiny", "prompt": "x", "echo": true}', 400, "invalid_request"),
        ("/v1/nothing", b"{}", 404, "not_found"),
        ("/v1/models", b"{}", 405, "method_not_allowed"),
        ("/api/v1/models", b'{"nmae": 1}', 400, "invalid_request"),
    ],
)
async def test_bad_requests_get_openais_error_object(
    http: httpx.AsyncClient, path: str, content: bytes, status: int, code: str
) -> None:
    answer = await http.post(path, content=content)

    assert answer.status_code == status
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


async def test_the_field_at_fault_is_named(http: httpx.AsyncClient) -> None:
    answer = await http.post(
        CHAT, json=GOOD | {"messages": [{"role": "user", "content": "a"}, {"role": "fool"}]}
    )

    assert answer.json()["error"]["param"] == "messages.1.role"


async def test_a_body_beyond_the_limit_is_413(http: httpx.AsyncClient) -> None:
    answer = await http.post(CHAT, content=b"x" * (8 * 1024 * 1024 + 1))

    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


async def test_a_chunked_body_beyond_the_limit_is_413(http: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(9 * 16):
            yield b"x" * 65536

    try:
        answer = await http.post(CHAT, content=chunks())
    except httpx.WriteError:
        return  # the server closed while we were still sending: as good
    assert answer.status_code == 413


async def test_the_clients_request_id_is_kept_when_it_is_plain(http: httpx.AsyncClient) -> None:
    kept = await http.post(CHAT, json=GOOD, headers={"x-request-id": "my-id.1"})
    replaced = await http.post(CHAT, json=GOOD, headers={"x-request-id": "a b"})

    assert kept.headers["x-request-id"] == "my-id.1"
    assert replaced.headers["x-request-id"].startswith("req-")


async def test_unknown_and_harmless_fields_are_ignored(http: httpx.AsyncClient) -> None:
    extra = {"user": "u", "metadata": {}, "store": True, "tools": [], "tool_choice": "auto", "zebra": 1}
    answer = await http.post(CHAT, json=GOOD | extra | {"temperature": None, "stop": None})

    assert answer.status_code == 200


async def test_probes_answer(http: httpx.AsyncClient) -> None:
    answers = [await http.get(path) for path in ("/health", "/livez", "/readyz", "/version")]

    assert [answer.status_code for answer in answers] == [200] * 4


async def test_metrics_have_the_names_that_dashboards_know(http: httpx.AsyncClient) -> None:
    await http.post(CHAT, json=GOOD)
    text = (await http.get("/metrics")).text

    for name in (
        'vllm:time_to_first_token_seconds_count{model_name="tiny"}',
        'vllm:num_requests_running{model_name="tiny"} 0.0',
        'vllm:num_requests_waiting{model_name="tiny"} 0.0',
        'vllm:generation_tokens_total{model_name="tiny"}',
        'vllm:prompt_tokens_total{model_name="tiny"}',
        'vllm:e2e_request_latency_seconds_count{model_name="tiny"}',
    ):
        assert name in text


async def test_openapi_describes_the_requests(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()

    assert document["info"]["title"] == "Stoker"
    assert "messages" in document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert "prompt" in document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert "post" in document["paths"][CHAT]


async def test_the_documentation_page_needs_no_other_server(http: httpx.AsyncClient) -> None:
    page = await http.get("/docs")
    linked = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    answers = [await http.get(path) for path in linked]

    assert page.status_code == 200
    assert "://" not in page.text
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert (await http.get("/docs-files/nothing.js")).json()["error"]["code"] == "not_found"


async def test_models_are_deployed_through_the_controller(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    route = cluster.route("deployed")
    cluster.controller.push(route)
    answer = await http.post(
        "/api/v1/models", json={"name": "deployed", "checkpoint_uri": "/models/deployed"}
    )
    listed = await http.get("/api/v1/models")
    deleted = await http.delete("/api/v1/models/org/missing")

    assert answer.json()["model"]["spec"]["name"] == "deployed"
    assert "deployed" in {model["spec"]["name"] for model in listed.json()["models"]}
    assert (deleted.status_code, deleted.json()["error"]["code"]) == (404, "model_not_found")


async def test_keys_are_asked_for_where_there_are_some(cluster: FakeCluster, tmp_path: Path) -> None:
    async with (
        GatewayProcess(cluster.controller_address, tmp_path, api_keys=json.dumps(["secret"])) as process,
        httpx.AsyncClient(base_url=process.url, timeout=30) as http,
    ):
        await process.wait_for_log("routes.synced")
        without = await http.get("/v1/models")
        wrong = await http.get("/v1/models", headers={"authorization": "Bearer nope"})
        right = await http.get("/v1/models", headers={"authorization": "Bearer secret"})
        probe = await http.get("/livez")

    assert [answer.status_code for answer in (without, wrong, right, probe)] == [401, 401, 200, 200]
    assert without.json()["error"]["code"] == "invalid_api_key"


async def test_without_a_controller_it_says_503_and_is_not_ready(tmp_path: Path) -> None:
    async with (
        GatewayProcess("127.0.0.1:9", tmp_path) as process,
        httpx.AsyncClient(base_url=process.url, timeout=30) as http,
    ):
        answer = await http.post(CHAT, json=GOOD)
        ready, alive = await http.get("/readyz"), await http.get("/livez")

    assert (answer.status_code, ready.status_code, alive.status_code) == (503, 503, 200)
    assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_a_taken_port_is_a_clear_failure(
    cluster: FakeCluster, gateway: GatewayProcess, tmp_path: Path
) -> None:
    taken = gateway.url.removeprefix("http://")
    process = GatewayProcess(cluster.controller_address, tmp_path, address=taken)
    await process.spawn()
    failed = await process.wait_for_log("service.failed")

    assert await process.stop() != 0
    assert f"cannot listen on {taken}" in failed["message"]


async def test_sigterm_lets_a_stream_end_and_refuses_new_requests(tmp_path: Path) -> None:
    async with FakeCluster() as cluster:
        cluster.controller.push(cluster.route("tiny"))
        cluster.agent.script = says_for_ever()
        process = GatewayProcess(cluster.controller_address, tmp_path, drain_seconds=20)
        async with process, httpx.AsyncClient(base_url=process.url, timeout=30) as http:
            await process.wait_for_log("routes.synced")
            async with http.stream("POST", CHAT, json=GOOD | {"stream": True}) as stream:
                lines = stream.aiter_lines()
                assert (await anext(lines)).startswith("data:")
                process.terminate()
                while (ready := await http.get("/readyz")).status_code == 200:
                    pass
                alive, refused = await http.get("/livez"), await http.post(CHAT, json=GOOD)
                more = [await anext(lines) for _ in range(10)]
            status = await process.stop()

    assert (ready.status_code, alive.status_code, refused.status_code) == (503, 200, 503)
    assert any(line.startswith("data:") for line in more)
    assert status == 0
