"""Errors as OpenAI's clients expect them: one object, all four keys, the right status and headers."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import Response

from stoker.errors import StokerError

MAX_RETRY_AFTER_SECONDS = 60
"""OpenAI's clients ignore a longer `Retry-After`."""

_RETRYABLE = frozenset({429, 503})


def error_object(error: StokerError) -> dict[str, Any]:
    """Return `{"error": {message, type, param, code}}`."""
    return {
        "error": {
            "message": error.message,
            "type": error.openai_type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_body(error: StokerError) -> bytes:
    """Return the object as JSON."""
    return json.dumps(error_object(error)).encode()


def error_headers(error: StokerError) -> dict[str, str]:
    """Return what the status asks for: `Retry-After` in whole seconds, 1 to 60."""
    headers = {"content-type": "application/json"}
    if error.http_status in _RETRYABLE or error.retry_after_seconds is not None:
        seconds = math.ceil(error.retry_after_seconds or 1.0)
        headers["retry-after"] = str(min(max(seconds, 1), MAX_RETRY_AFTER_SECONDS))
    if error.http_status == 413:  # noqa: PLR2004 - the rest of the body is not read
        headers["connection"] = "close"
    return headers


def error_response(error: StokerError) -> Response:
    """Return the error as a response."""
    return Response(error_body(error), status_code=error.http_status, headers=error_headers(error))
