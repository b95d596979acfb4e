"""Timings of a start, for the sessions that waited for it."""

from __future__ import annotations

from dataclasses import replace

from services.node_agent.host_state import ReplicaPhase
from services.node_agent.sessions.awaited_start import AwaitedStart
from stoker.v1.session_pb2 import GenerateEvent, SessionTimings, Token
from stoker.v1.start_pb2 import StartTimings
from stoker.v1.worker_pb2 import LoadModelResponse
from tests.unit.services.node_agent.test_reports import STARTING

LOADING = replace(
    STARTING, phase=ReplicaPhase.READY, ready_seconds=11.0, loaded=LoadModelResponse(loading=True)
)
COMPLETE = replace(LOADING, loaded=LoadModelResponse(timings=StartTimings(weights_seconds=2.0)))


def timed() -> GenerateEvent:
    return GenerateEvent(tokens=[Token(id=1)], timings=SessionTimings(prefill_seconds=1.0))


def test_a_session_that_began_while_weights_arrived_is_told_once_how_the_start_went() -> None:
    replicas = [LOADING]
    start = AwaitedStart(lambda: replicas[-1])
    replicas.append(COMPLETE)
    first, last = timed(), timed()

    start.add_to(GenerateEvent())
    start.add_to(first)
    start.add_to(last)

    assert first.timings.start.weights_seconds == 2.0
    assert first.timings.start.placement_seconds == 0.25
    assert not last.timings.HasField("start")


def test_a_session_on_a_replica_that_had_its_weights_is_told_nothing() -> None:
    event = timed()
    AwaitedStart(lambda: COMPLETE).add_to(event)

    assert not event.timings.HasField("start")


def test_a_replica_that_is_gone_has_no_start() -> None:
    replicas = [LOADING, None]
    start = AwaitedStart(lambda: replicas.pop(0))
    event = timed()
    start.add_to(event)

    assert not event.timings.HasField("start")
