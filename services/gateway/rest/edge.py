"""The edge: what every HTTP request passes first. One plain ASGI layer, cheap on streams.

It names the request, checks the key, bounds the body, and turns whatever nobody caught into one log entry.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.api_keys import ApiKeys
from services.gateway.rest.errors import error_response
from stoker import log
from stoker.errors import BodyTooLarge, CapacityError, StokerError
from stoker.ids import new_id

REQUEST_ID_HEADER = "x-request-id"
REQUEST_ID_KEY = "stoker.request_id"
"""Where the scope holds it."""

DISCARDED_BODIES = 8
"""Times the limit that is read and dropped of a body that is too long, before the connection is cut."""

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/metrics", "/version"})
"""Probes and scrapers have no key."""


class Edge:
    """Wraps the application.

    Args:
        app: What answers.
        max_body_bytes: Longest body.
        api_keys: Keys accepted; probes and scrapers need none.
        max_requests: Requests open at a time; probes and scrapers always find room.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, api_keys: ApiKeys, max_requests: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._api_keys = api_keys
        self._max_requests = max_requests
        self._open_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = name_request(headers.get(REQUEST_ID_HEADER))
        scope[REQUEST_ID_KEY] = request_id
        named = (REQUEST_ID_HEADER.encode(), request_id.encode())

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), named]
            await send(message)

        with log.bind(request_id=request_id):
            self._open_requests += 1
            try:
                await self._admit(scope, headers, receive, send_named)
            except Exception as error:  # noqa: BLE001 - the boundary of an HTTP request
                log.get().error("http.crashed", path=scope["path"], exc_info=error)
            finally:
                self._open_requests -= 1

    async def _admit(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        if scope["path"] not in _OPEN_PATHS:
            try:
                self._api_keys.check(headers.get("authorization", ""))
                self._check_room()
            except StokerError as refusal:
                await error_response(refusal)(scope, receive, send)
                return
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            if "expect" not in headers:  # the client sends its body in any case
                await self._discard(receive)
            await error_response(self._too_large())(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _check_room(self) -> None:
        if self._open_requests > self._max_requests:
            raise CapacityError(
                f"this gateway holds {self._max_requests} requests, as many as it may; try another or later",
                retry_after_seconds=1.0,
            )

    def _bounded(self, receive: Receive) -> Receive:
        seen_bytes = 0

        async def receive_bounded() -> Message:
            nonlocal seen_bytes
            message = await receive()
            if message["type"] == "http.request":
                seen_bytes += len(message.get("body", b""))
                if seen_bytes > self._max_body_bytes:
                    await self._discard(receive)
                    raise self._too_large()
            return message

        return receive_bounded

    async def _discard(self, receive: Receive) -> None:
        """Read the rest of a body, up to a bound: most clients read an answer only after they sent all."""
        left_bytes = DISCARDED_BODIES * self._max_body_bytes
        while left_bytes > 0:
            message = await receive()
            left_bytes -= len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the request's body is larger than {self._max_body_bytes} bytes; send less")


def name_request(given: str | None) -> str:
    """Return the client's own request id when it is short and plain, else a fresh one."""
    return given if given is not None and _SANE_ID.fullmatch(given) else new_id("req")
