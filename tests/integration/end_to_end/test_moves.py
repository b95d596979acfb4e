"""A replica that is stopped while it streams: its sessions move, on real processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from stoker.rpc import connect
from stoker.v1 import model_pb2
from stoker.v1.node_agent_pb2 import REPLICA_STATE_READY, GetReportRequest, StopReplicaRequest
from stoker.v1.node_agent_pb2_grpc import NodeAgentStub
from tests.integration.end_to_end.stoker_up import StokerUp

TOKENS = 400


def test_a_replica_that_is_stopped_while_it_streams_hands_its_session_over(
    up: StokerUp, tiny_model: Path
) -> None:
    spec = model_pb2.ModelSpec(
        name="pair", checkpoint_uri=str(tiny_model), keep_alive_seconds=-1, min_replicas=2, max_replicas=2
    )
    with up.client() as client:
        client.deploy(spec)
    asyncio.run(_until_two_are_ready(up))
    wanted = _stream(up)

    def stop_the_busy_one() -> None:
        asyncio.run(_stop_the_busy_one(up))

    assert _stream(up, after_first=stop_the_busy_one) == wanted
    (moved,) = up.log_events("gateway", "session.moved")
    assert moved["from_replica_id"] != moved["to_replica_id"]
    assert (moved["path"], moved["reason"], moved["why_not_shipped"]) == ("ship", "test", "")
    assert moved["shipped_bytes"] > 0
    assert moved["recomputed_tokens"] < moved["shipped_tokens"]
    assert up.log_events("gateway", "session.resumed") == []


async def _until_two_are_ready(up: StokerUp) -> None:
    async with connect(up.cluster.node_agent) as channel:
        while True:
            report = await NodeAgentStub(channel).GetReport(GetReportRequest())
            if sum(replica.state == REPLICA_STATE_READY for replica in report.replicas) == 2:
                return
            await asyncio.sleep(0.1)  # the workers need the processors


async def _stop_the_busy_one(up: StokerUp) -> None:
    fence = up.log_events("node_agent", "controller.joined")[-1]["fence"]
    async with connect(up.cluster.node_agent) as channel:
        stub = NodeAgentStub(channel)
        report = await stub.GetReport(GetReportRequest())
        (busy,) = [replica for replica in report.replicas if replica.running_sessions]
        order = StopReplicaRequest(replica_id=busy.replica_id, grace_seconds=60, reason="test", fence=fence)
        await stub.StopReplica(order)


def _stream(up: StokerUp, after_first: Callable[[], None] = lambda: None) -> str:
    text = ""
    with up.openai() as client:
        chunks = client.chat.completions.create(
            model="pair",
            messages=[{"role": "user", "content": "the quick brown fox"}],
            max_tokens=TOKENS,
            seed=5,
            temperature=0.8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for number, chunk in enumerate(chunks):
            if number == 3:
                after_first()
            for choice in chunk.choices:
                text += choice.delta.content or ""
    return text
