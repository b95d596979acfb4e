"""Traces: where a request's time went, stage by stage; the latest ones are kept for `/api/v1/requests`."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict

from stoker.v1 import session_pb2, start_pb2


@dataclass(slots=True, kw_only=True)
class Trace:
    """One request's times, filled in while it runs. All durations in seconds."""

    request_id: str
    model: str
    kind: str
    """`chat` or `completion`."""
    adapter: str = ""
    """What was added to the model; empty = nothing."""
    started_seconds: float
    """Monotonic, when the request's body was complete."""
    unix_seconds: float
    route_seconds: float = 0.0
    """Looking the model up, a short wait for an unknown name included."""
    files_seconds: float = 0.0
    """Waiting for the model's small files; 0 when they were cached."""
    text_seconds: float = 0.0
    """Chat template and tokenization."""
    acquire_seconds: float = 0.0
    """Waiting for a ready replica; 0 when there was one."""
    start: start_pb2.StartTimings | None = None
    """The start this request waited for."""
    worker: session_pb2.SessionTimings | None = None
    """Of the first choice, in its worker."""
    first_token_seconds: float | None = None
    """From the request's arrival to its first token."""
    total_seconds: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    choices: int = 0
    replica_ids: list[str] = field(default_factory=list)
    """Replicas tried, in order."""
    hops: int = 0
    """Times a session went on at another replica after a failure."""
    moves: int = 0
    """Times a session moved to another replica while it ran."""
    resumed_tokens: int = 0
    """Tokens that were computed again for it."""
    resume_seconds: float = 0.0
    """From the failures noticed to the next tokens, summed."""
    revision: str = ""
    """Of the weights, as the route named it."""
    finish: str = "running"
    """`stop`, `length`, `cancelled` (the client left), or an error's code."""

    def note_timings(self, timings: session_pb2.SessionTimings) -> None:
        """Take a session's times in its worker, and those of the start whose end it waited for."""
        self.worker = session_pb2.SessionTimings()
        self.worker.CopyFrom(timings)
        if timings.HasField("start"):
            self.start = timings.start
            self.worker.ClearField("start")

    @property
    def tokens_per_second(self) -> float | None:
        """Return the rate after the first token; None before there are two."""
        if self.first_token_seconds is None or self.total_seconds is None or self.completion_tokens <= 1:
            return None
        seconds = self.total_seconds - self.first_token_seconds
        return (self.completion_tokens - 1) / seconds if seconds > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        plain = {
            name: getattr(self, name)
            for name in self.__slots__
            if name not in ("started_seconds", "start", "worker")
        }
        for name in ("start", "worker"):
            message = getattr(self, name)
            plain[name] = (
                None
                if message is None
                else MessageToDict(
                    message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
                )
            )
        return plain | {"tokens_per_second": self.tokens_per_second}


class Traces:
    """The latest requests, by id; the oldest gives way.

    Args:
        capacity: How many are kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._by_id: OrderedDict[str, Trace] = OrderedDict()

    def add(self, trace: Trace) -> None:
        """Keep a trace from now on; it may still be filled in."""
        self._by_id.pop(trace.request_id, None)
        self._by_id[trace.request_id] = trace
        while len(self._by_id) > self._capacity:
            self._by_id.popitem(last=False)

    def get(self, request_id: str) -> Trace | None:
        """Return a request's trace; None when it is unknown or too old."""
        return self._by_id.get(request_id)
