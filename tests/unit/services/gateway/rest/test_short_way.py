"""The short way answers as the application would, and leaves it everything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from services.gateway.rest.short_way import ShortWay
from stoker.errors import QueueFull

PATH = "/v1/chat/completions"


async def application(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("application")(scope, receive, send)


async def echo(http: Request) -> Response:
    return Response(await http.body())


async def ask(
    handler: Any, *, path: str = PATH, method: str = "POST", leaves: bool = False
) -> list[dict[str, Any]]:
    """Send a request; return what came back."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"} if leaves else {"type": "http.request", "body": b"hello"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": []}
    await ShortWay(application, {PATH: handler})(scope, receive, send)
    return sent


async def test_its_own_paths_are_answered_by_their_handlers() -> None:
    sent = await ask(echo)

    assert (sent[0]["status"], sent[1]["body"]) == (200, b"hello")


@pytest.mark.parametrize(("path", "method"), [(PATH, "GET"), (f"{PATH}/", "POST"), ("/v1/models", "POST")])
async def test_everything_else_is_the_applications(path: str, method: str) -> None:
    sent = await ask(echo, path=path, method=method)

    assert sent[1]["body"] == b"application"


async def test_a_refusal_is_an_error_object_with_its_status() -> None:
    async def refuse(_: Request) -> Response:
        raise QueueFull("full", retry_after_seconds=2)

    sent = await ask(refuse)

    assert sent[0]["status"] == 429
    assert (b"retry-after", b"2") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["code"] == "queue_full"


async def test_a_crash_is_answered_without_its_insides_and_raised_to_the_edge() -> None:
    sent: list[dict[str, Any]] = []

    async def crash(_: Request) -> Response:
        raise KeyError("secret")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
    with pytest.raises(KeyError):
        await ShortWay(application, {PATH: crash})(scope, receive, send)

    assert sent[0]["status"] == 500
    assert b"secret" not in sent[1]["body"]


async def test_a_client_that_leaves_before_its_body_is_complete_is_no_error() -> None:
    assert await ask(echo, leaves=True) == []
