"""Random fault schedules: whatever happens, a stream is what it would have been, and no call stays open.

The gateway's own session, hops, move rounds and mover run over toy replicas; a failing seed names its faults.
"""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.hops import HopPolicy
from services.gateway.job import Job
from services.gateway.routes import RouteTable
from services.gateway.sampling import SamplingRequest
from services.gateway.session_run import SessionRun
from services.gateway.text_request import Prompts, TextRequest
from services.gateway.trace import Trace
from stoker.v1 import controller_pb2, model_pb2
from tests.integration.streams.client import HastyClock, Seen
from tests.simulation.streams.toy_cluster import ToyCluster, ToyPlacement, toy_token
from tests.unit.services.gateway.builders import TOKENIZER, session

TOKENS = 40
POLICY = HopPolicy(max_attempts=1_000, max_hops=1_000, resume_timeout_seconds=1e9)


async def play(seed: int, *, nodes: int, faults: float) -> tuple[str, str, ToyCluster, Trace]:
    """Return what the client saw, what it should have seen, and the world it happened in."""
    cluster, clock, seen, table = (
        ToyCluster(seed, nodes=nodes, faults=faults),
        HastyClock(),
        Seen(),
        RouteTable(),
    )
    route = controller_pb2.Route(
        model=model_pb2.Model(spec=model_pb2.ModelSpec(name="tiny", checkpoint_uri="/m")),
        replicas=[controller_pb2.RouteReplica(replica_id=name, max_batch=4) for name in cluster.nodes],
    )
    table.apply(controller_pb2.RoutesUpdate(snapshot=True, routes=[route]))
    trace = Trace(
        request_id="r", model="tiny", kind="chat", started_seconds=clock.now_seconds(), unix_seconds=0
    )
    trace.first_token_seconds = 0.0  # its client has seen something: nothing but success will do
    request = TextRequest(
        request_id="r", model="tiny", content=Prompts(prompts=["x"]), sampling=SamplingRequest()
    )
    job = Job(request=request, trace=trace, sink=seen, clock=clock, timeout_seconds=1e12)
    stream = session(max_tokens=TOKENS, seed=seed)
    placement = ToyPlacement(table, clock, cluster)
    run = SessionRun(stream, 0, job, placement, cluster, POLICY)  # type: ignore[arg-type]
    await run.run(table.find("tiny").replicas[0])
    await asyncio.sleep(0)
    log: list[int] = []
    while len(log) < TOKENS:
        log.append(toy_token(stream.prompt_token_ids, seed, log))
    assert placement.in_flight == {}, cluster.history
    assert stream.token_ids == log, (seed, cluster.history)
    return seen.text, TOKENIZER.decode(log), cluster, trace


@pytest.mark.parametrize("faults", [0.01, 0.05, 0.15])
async def test_no_fault_schedule_changes_a_stream_or_leaves_a_call_open(faults: float) -> None:
    moves = hops = 0
    for seed in range(80):
        text, wanted, cluster, trace = await play(seed, nodes=2 + seed % 3, faults=faults)

        assert text == wanted, (seed, cluster.history)
        assert cluster.streams == 0, (seed, cluster.history)
        moves, hops = moves + trace.moves, hops + trace.hops
    assert moves > 5
    assert hops > 10
