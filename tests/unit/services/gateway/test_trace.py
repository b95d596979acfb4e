"""Traces: the latest are kept, as plain JSON."""

from __future__ import annotations

import json

from services.gateway.trace import Trace, Traces
from stoker.v1 import start_pb2


def trace(request_id: str, **fields: object) -> Trace:
    return Trace(request_id=request_id, model="m", kind="chat", started_seconds=5, unix_seconds=9, **fields)


def test_the_oldest_trace_gives_way() -> None:
    traces = Traces(2)
    for request_id in ("a", "b", "c"):
        traces.add(trace(request_id))

    assert traces.get("a") is None
    assert traces.get("c") is not None


def test_a_trace_is_plain_json() -> None:
    start = start_pb2.StartTimings(weights_seconds=0.5)
    start.transfers.add(tier="disk", bytes=7)
    shown = json.loads(json.dumps(trace("a", start=start).to_json()))

    assert shown["start"]["weights_seconds"] == 0.5
    assert shown["start"]["transfers"][0]["tier"] == "disk"
    assert shown["worker"] is None
    assert "started_seconds" not in shown


def test_the_rate_counts_from_the_first_token() -> None:
    counted = trace("a", first_token_seconds=1.0, total_seconds=3.0, completion_tokens=21)

    assert counted.tokens_per_second == 10
    assert trace("b").tokens_per_second is None
