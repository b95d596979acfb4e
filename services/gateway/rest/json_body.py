"""JSON bodies that are objects."""

from __future__ import annotations

import json
from typing import Any

from stoker.errors import InvalidRequest


def read_object(body: bytes) -> dict[str, Any]:
    """Return the object in a body.

    Raises:
        InvalidRequest: It is not JSON, or not an object.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body is a JSON {type(value).__name__}; it must be an object")
    return value
