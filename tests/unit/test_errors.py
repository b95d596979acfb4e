"""Errors: one table, one code per class, and nothing lost on the way over gRPC."""

from __future__ import annotations

import grpc
import pytest

from stoker import errors, rpc
from stoker.errors import BY_CODE, ModelNotFound, StokerError


def test_every_code_leads_back_to_the_class_that_defined_it() -> None:
    for code, cls in BY_CODE.items():
        assert cls.code == code
        assert "code" in vars(cls), f"{cls.__name__} only inherits {code!r}"


def test_no_two_classes_define_the_same_code() -> None:
    defined = [cls.code for cls in errors._classes(StokerError) if "code" in vars(cls)]

    assert len(defined) == len(set(defined))


@pytest.mark.parametrize("cls", sorted(BY_CODE.values(), key=lambda cls: cls.code))
def test_an_error_survives_the_wire_whole(cls: type[StokerError]) -> None:
    sent = cls("what ä happened", retry_after_seconds=2.5, param="n", details={"near": ["a"]})

    received = rpc.decode(rpc.encode(sent))

    assert type(received) is cls
    assert (received.message, received.retry_after_seconds) == (sent.message, sent.retry_after_seconds)
    assert (received.param, received.details) == (sent.param, sent.details)


def test_an_unknown_code_becomes_the_root_class() -> None:
    """A newer peer may send codes we don't know."""
    raw = rpc.encode(ModelNotFound("gone")).replace(b"model_not_found", b"from_the_future")

    assert type(rpc.decode(raw)) is StokerError


@pytest.mark.parametrize("cls", sorted(BY_CODE.values(), key=lambda cls: cls.code))
def test_every_error_has_a_status_that_is_an_error(cls: type[StokerError]) -> None:
    assert cls.grpc_status is not grpc.StatusCode.OK
    assert 400 <= cls.http_status < 600
