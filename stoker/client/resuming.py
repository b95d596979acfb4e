"""The metadata by which a call of `stoker.v1.Inference` outlives its gateway. Pure."""

from __future__ import annotations

from stoker.errors import InvalidRequest

KEY = "idempotency-key"
LAST_EVENT = "last-event-id"


def resuming(idempotency_key: str | None, last_event_id: str | None) -> tuple[tuple[str, str], ...]:
    """Return a call's metadata.

    Args:
        idempotency_key: Of the request; None = it ends with its gateway.
        last_event_id: Of the last event that came; None = none came.

    Raises:
        InvalidRequest: One of them can't be sent as metadata; the gateway checks everything else.
    """
    given = ((KEY, idempotency_key), (LAST_EVENT, last_event_id))
    found = tuple((name, value) for name, value in given if value is not None)
    for name, value in found:
        if not (value.isascii() and value.isprintable()):
            raise InvalidRequest(f"{name} is {value[:64]!r}; give visible ASCII characters only", param=name)
    return found
