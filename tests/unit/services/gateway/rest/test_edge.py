"""The edge names requests, asks for keys and bounds bodies before anything else runs."""

from __future__ import annotations

from typing import Any

import pytest

from services.gateway.api_keys import ApiKeys
from services.gateway.rest.edge import Edge, name_request
from stoker.errors import BodyTooLarge


class App:
    """Reads its body and answers 200."""

    def __init__(self) -> None:
        self.body_bytes: int | None = None
        self.error: Exception | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer."""
        self.body_bytes = 0
        try:
            while True:
                message = await receive()
                self.body_bytes += len(message["body"])
                if not message.get("more_body"):
                    break
        except BodyTooLarge as error:
            self.error = error
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def ask(
    app: App, *, chunks: int = 1, path: str = "/v1/models", headers: dict[str, str] | None = None, **edge: Any
) -> list[dict[str, Any]]:
    """Send chunks of 10 bytes; return what came back."""
    sent: list[dict[str, Any]] = []
    left = chunks

    async def receive() -> dict[str, Any]:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b"x" * 10, "more_body": left > 0}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    settings: dict[str, Any] = {"max_body_bytes": 25, "api_keys": ApiKeys([]), "max_requests": 10} | edge
    scope = {"type": "http", "method": "POST", "path": path, "headers": raw}
    await Edge(app, **settings)(scope, receive, send)
    return sent


async def test_a_body_within_the_limit_passes_and_the_answer_is_named() -> None:
    app = App()
    sent = await ask(app, chunks=2, headers={"x-request-id": "mine"})

    assert app.body_bytes == 20
    assert (b"x-request-id", b"mine") in sent[0]["headers"]


async def test_a_body_that_grows_beyond_the_limit_is_refused() -> None:
    app = App()
    await ask(app, chunks=5)

    assert isinstance(app.error, BodyTooLarge)


async def test_a_body_announced_too_long_never_reaches_the_application() -> None:
    app = App()
    sent = await ask(app, chunks=9, headers={"content-length": "90"})

    assert sent[0]["status"] == 413
    assert app.body_bytes is None


@pytest.mark.parametrize(
    ("authorization", "status"),
    [("", 401), ("Bearer", 401), ("Bearer wrong", 401), ("Basic right", 401), ("bearer right", 200)],
)
async def test_only_known_keys_pass(authorization: str, status: int) -> None:
    sent = await ask(App(), api_keys=ApiKeys(["right", "other"]), headers={"authorization": authorization})

    assert sent[0]["status"] == status


async def test_probes_need_no_key_and_no_room() -> None:
    sent = await ask(App(), path="/livez", api_keys=ApiKeys(["right"]), max_requests=0)

    assert sent[0]["status"] == 200


async def test_more_requests_than_allowed_are_sent_elsewhere() -> None:
    sent = await ask(App(), max_requests=0)

    assert sent[0]["status"] == 503


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "a\nb", "né"])
def test_an_odd_request_id_is_replaced(given: str | None) -> None:
    assert name_request(given).startswith("req-")
