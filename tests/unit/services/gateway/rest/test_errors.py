"""Errors have OpenAI's four keys and a Retry-After where it helps."""

from __future__ import annotations

import json

import pytest

from services.gateway.rest.errors import error_body, error_headers
from stoker.errors import BY_CODE, BodyTooLarge, CapacityError, InvalidRequest, QueueFull


@pytest.mark.parametrize("cls", BY_CODE.values())
def test_every_error_has_all_four_keys(cls: type[Exception]) -> None:
    error = json.loads(error_body(cls("what happened")))["error"]

    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("asked", "shown"), [(None, "1"), (0.2, "1"), (7.2, "8"), (4000, "60")])
def test_retry_after_is_whole_seconds_up_to_a_minute(asked: float | None, shown: str) -> None:
    assert error_headers(QueueFull("full", retry_after_seconds=asked))["retry-after"] == shown
    assert error_headers(CapacityError("no room", retry_after_seconds=asked))["retry-after"] == shown


def test_the_callers_own_fault_is_not_retried() -> None:
    assert "retry-after" not in error_headers(InvalidRequest("bad"))


def test_an_unread_body_closes_the_connection() -> None:
    assert error_headers(BodyTooLarge("big"))["connection"] == "close"
