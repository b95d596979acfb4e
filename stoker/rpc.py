"""gRPC in one place: servers with health, reflection and typed errors; channels with deadlines.

A handler raises a `StokerError`; the interceptor here sends it as a status plus one trailing metadata
entry (`stoker-error-bin`, JSON); `translated` on the client's side raises the same class again. A unary call
without a deadline gets `DEFAULT_DEADLINE_SECONDS`; streams are given theirs by the caller, and dead peers are
found by keep-alive pings.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeVar, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from stoker import log
from stoker.errors import BY_CODE, ConfigError, DeadlineExceeded, InvalidRequest, PeerError, StokerError
from stoker.units import MIB

DEFAULT_DEADLINE_SECONDS = 10.0
MAX_MESSAGE_BYTES = 4 * MIB
ERROR_KEY = "stoker-error-bin"
MAX_STATUS_BYTES = 1000
MAX_ERROR_BYTES = 3500
"""gRPC refuses trailing metadata above 8192 bytes. The status message may triple (percent encoding) and the
error's JSON grow by a third (base64): 3 · 1000 + 4/3 · 3500 stays below."""

KEEPALIVE_SECONDS = 3
"""A silent peer is pinged after this, and given up after as long again: a paused process or a node that lost
its network ends its streams within 6 s."""

_KEEPALIVE = [
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_SECONDS * 1000),
    # A ping of gRPC's own that is under way stands for the keep-alive's, and would be waited for 60 s.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
_BROKEN_STREAM = (
    "RST_STREAM",
    "Stream removed",
    "GOAWAY",
    "Connection reset",
    "Socket closed",
    "Internal error from Core",  # of a write on a call whose connection ended while this process stood still
)
"""How gRPC names a connection that ended under a call, where the status is not UNAVAILABLE."""
_CONNECTING = re.compile(r".*last error: \w+: [a-z0-9]+:\S+: (?:Failed to connect to remote host: )?")

UNREACHABLE = "unreachable"
"""Detail of an error that says: nobody answers where this peer should be."""

_SERVER_ONLY = [
    ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
]


class Server:
    """A gRPC server with health and reflection; register services on `grpc_server`, then `start`."""

    def __init__(self, service_names: Sequence[str]) -> None:
        """Args: service_names: full names, e.g. `stoker.v1.Controller`, for health and reflection."""
        self.grpc_server = grpc.aio.server(
            interceptors=[ErrorInterceptor()], options=[*_KEEPALIVE, *_SERVER_ONLY]
        )
        self._names = (*service_names, "")
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        reflection.enable_server_reflection(
            [*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME], self.grpc_server
        )

    def bind(self, address: str) -> int:
        """Bind `host:port` or `unix:path`; returns the port (0 asks for a free one; 1 for unix sockets).

        Raises:
            ConfigError: The address is taken or not ours.
        """
        try:
            port = self.grpc_server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: is the port taken by another program?") from error
        if port == 0:
            raise ConfigError(f"cannot listen on {address}: is the port taken by another program?")
        return port

    async def start(self) -> None:
        """Begin to serve and answer SERVING to health checks."""
        await self.grpc_server.start()
        await self.set_serving(serving=True)

    async def set_serving(self, *, serving: bool) -> None:
        """Change what health checks see."""
        status = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace_seconds: float = 0.0) -> None:
        """Refuse new calls, let running ones end within the grace, then cancel them."""
        await self.set_serving(serving=False)
        await self.grpc_server.stop(grace_seconds)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a handler raises into a gRPC status, once, here."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of every method."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith("/grpc."):
            return handler
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behaviour = getattr(handler, kind)
            if behaviour is not None:
                make = getattr(grpc, f"{kind}_rpc_method_handler")
                is_stream = kind.endswith("_stream")
                wrap = _streaming if is_stream else _unary
                serialize = handler.response_serializer
                return cast(
                    "grpc.RpcMethodHandler[Any, Any]",
                    make(
                        wrap(behaviour, handler_call_details.method),
                        request_deserializer=handler.request_deserializer,
                        response_serializer=_or_bytes(serialize) if is_stream else serialize,
                    ),
                )
        return handler


def _or_bytes(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """Return a serializer that takes messages in their wire form, too: large ones are handed on unopened."""
    return lambda answer: answer if serialize is None or isinstance(answer, bytes) else serialize(answer)


def _unary(behaviour: Callable[..., Any], method: str) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(request, context)
        except Exception as error:  # noqa: BLE001 - the task boundary of every call
            await _abort(context, error, method)

    return call


def _streaming(behaviour: Callable[..., Any], method: str) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            answers = behaviour(request, context)
            if inspect.isawaitable(answers):
                await answers  # a handler that writes to the context itself
                return
            async with aclosing(answers):  # a caller that leaves ends the handler at once
                async for answer in answers:
                    yield answer
        except Exception as error:  # noqa: BLE001 - the task boundary of every call
            await _abort(context, error, method)

    return call


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    told = own_error(error, method)
    await context.abort(
        told.grpc_status,
        _cut(told.message, MAX_STATUS_BYTES),
        trailing_metadata=((ERROR_KEY, encode(told)),),
    )


def own_error(error: Exception, what: str) -> StokerError:
    """Return an error as the other side is told it; one that nobody foresaw is logged with its trace.

    Args:
        error: What a call's handler raised.
        what: It was about, for people, e.g. the method's name.
    """
    if isinstance(error, StokerError):
        return error
    log.get().error("rpc.crashed", method=what, exc_info=error)
    return StokerError(f"{what} failed inside: {type(error).__name__}: {error}")


def encode(error: StokerError) -> bytes:
    """Return the error as the JSON that travels in the trailing metadata, `MAX_ERROR_BYTES` at most.

    One that is larger loses its details (they become `{"cut": true}`) and the end of its message.
    """
    raw = _as_json(error, error.message, error.details)
    for message_bytes in (2000, 500):  # 500 fit even where JSON writes each byte as six
        if len(raw) > MAX_ERROR_BYTES:
            raw = _as_json(error, _cut(error.message, message_bytes), {"cut": True})
    return raw


def _as_json(error: StokerError, message: str, details: dict[str, Any]) -> bytes:
    fields = {
        "code": error.code,
        "message": message,
        "retry_after_seconds": error.retry_after_seconds,
        "param": error.param,
        "details": details,
    }
    return json.dumps(fields, ensure_ascii=False).encode(errors="replace")


def _cut(text: str, limit_bytes: int) -> str:
    raw = text.encode(errors="replace")  # a file's name may hold what UTF-8 does not
    if len(raw) <= limit_bytes:
        return raw.decode()
    mark = " … (cut)"
    return raw[: limit_bytes - len(mark.encode())].decode(errors="ignore") + mark


def decode(raw: bytes) -> StokerError:
    """Return the error that `encode` wrote; an unknown code becomes the root class."""
    fields = json.loads(raw)
    cls = BY_CODE.get(fields["code"], StokerError)
    return cls(
        fields["message"],
        retry_after_seconds=fields["retry_after_seconds"],
        param=fields["param"],
        details=fields["details"],
    )


def from_rpc_error(error: grpc.aio.AioRpcError, peer: str) -> StokerError:
    """Return the StokerError that a failed call means; `peer` names who was called, for people."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY and isinstance(value, bytes):
            with suppress(ValueError, KeyError, TypeError):  # not written by `encode`: the status still tells
                return decode(value)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{peer} did not answer in time")
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(f"{peer} refused the request: {error.details()}")
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED) or _is_of_transport(error):
        return PeerError(
            f"{peer} cannot be reached: {_reason(error.details() or 'no reason given')}",
            details={UNREACHABLE: peer},
        )
    return StokerError(f"{peer} failed: {error.code().name}: {error.details()}")


def _reason(details: str) -> str:
    """Return the end of what gRPC says of a failed connection: the list of its attempts helps nobody."""
    return _CONNECTING.sub("", details)


def _is_of_transport(error: grpc.aio.AioRpcError) -> bool:
    """Say whether the connection broke in the middle of an answer: our handlers' errors carry an entry."""
    return error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and any(
        sign in (error.details() or "") for sign in _BROKEN_STREAM
    )


@contextmanager
def translated(peer: str) -> Iterator[None]:
    """Raise StokerErrors instead of gRPC's own inside this block.

    Args:
        peer: Who is called, for people, e.g. `node agent node-1`.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, peer) from error


C = TypeVar("C", bound=grpc.aio.Call)


@contextmanager
def cancelled_after(call: C) -> Iterator[C]:
    """Cancel a streaming call when the block is left: gRPC goes on with one nobody reads any more."""
    try:
        yield call
    finally:
        call.cancel()  # does nothing to a call that has ended


class _DefaultDeadline(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self,
        continuation: Callable[..., Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        if client_call_details.timeout is None:
            client_call_details = grpc.aio.ClientCallDetails(
                method=client_call_details.method,
                timeout=DEFAULT_DEADLINE_SECONDS,
                metadata=client_call_details.metadata,
                credentials=client_call_details.credentials,
                wait_for_ready=client_call_details.wait_for_ready,
            )
        return await continuation(client_call_details, request)


def connect(address: str) -> grpc.aio.Channel:
    """Return a channel to `host:port` or `unix:path`; it connects, and reconnects, by itself."""
    options = [
        *_KEEPALIVE,
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return grpc.aio.insecure_channel(address, options=options, interceptors=[_DefaultDeadline()])
