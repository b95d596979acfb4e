"""What a failed call means: a connection that broke is a peer that can't be reached, whatever gRPC says."""

from __future__ import annotations

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from stoker.errors import PeerError, QueueFull, StokerError
from stoker.rpc import ERROR_KEY, encode, from_rpc_error


def failed(code: grpc.StatusCode, details: str, *trailing: tuple[str, bytes]) -> StokerError:
    return from_rpc_error(AioRpcError(code, Metadata(), Metadata(*trailing), details), "node agent node-1")


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
        (grpc.StatusCode.UNKNOWN, "Stream removed"),
        (grpc.StatusCode.INTERNAL, "Internal error from Core"),
    ],
)
def test_a_connection_that_ended_under_a_call_is_a_peer_that_cannot_be_reached(
    code: grpc.StatusCode, details: str
) -> None:
    error = failed(code, details)

    assert isinstance(error, PeerError)
    assert "node agent node-1" in error.message


def test_what_a_peer_itself_fails_with_is_no_broken_connection() -> None:
    assert type(failed(grpc.StatusCode.INTERNAL, "its own fault")) is StokerError


def test_what_a_peer_says_counts_more_than_the_status() -> None:
    said = encode(QueueFull("full", retry_after_seconds=2.0))

    error = failed(grpc.StatusCode.INTERNAL, "Socket closed", (ERROR_KEY, said))

    assert isinstance(error, QueueFull)
    assert error.retry_after_seconds == 2.0
