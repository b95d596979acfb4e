"""Replicas on a real node: started, asked, stopped, refused."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from stoker.errors import CallerError, Fenced, ReplicaBusy, ReplicaGone, StokerError
from stoker.rpc import translated
from stoker.v1 import session_pb2
from stoker.v1.model_pb2 import CheckpointInfo
from stoker.v1.node_agent_pb2 import (
    REPLICA_STATE_FAILED,
    REPLICA_STATE_READY,
    GetReportRequest,
    ReadLogsRequest,
    StopReplicaRequest,
)
from tests.integration.node_agent.cluster import OneNode, request

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [3, 76, 73, 80, 80, 83, 340, 365, 1, 203, 4]


async def generate(node: OneNode, wanted: session_pb2.GenerateRequest) -> list[int]:
    """Return a session's tokens."""
    tokens: list[int] = []
    with translated("node agent"):
        async for event in node.stub.Generate(wanted):
            assert event.position == len(tokens)
            tokens += [token.id for token in event.tokens]
    return tokens


async def ready(node: OneNode, model: Path, replica_id: str) -> None:
    """Start a replica and wait for it."""
    await node.start_replica(replica_id, model, device=1)
    await node.listener.replica(replica_id, REPLICA_STATE_READY)


def reference(model: Path, prompt: list[int], count: int) -> list[int]:
    """Return what transformers generates, greedily."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([prompt])
    generated = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=1
    )
    return [int(token) for token in generated[0, len(prompt) :]]


async def test_a_replica_becomes_ready_and_reports_its_stages(node: OneNode, tiny_model: Path) -> None:
    await node.start_replica("rep-stages", tiny_model, device=1, predicted_seconds=0.5)
    replica = await node.listener.replica("rep-stages", REPLICA_STATE_READY)

    assert replica.timings.placement_seconds == pytest.approx(0.001)
    assert replica.timings.predicted_seconds == pytest.approx(0.5)
    assert replica.timings.attach_seconds > 0
    assert replica.timings.skeleton_seconds > 0
    assert replica.timings.assign_seconds > 0
    assert sum(transfer.bytes for transfer in replica.timings.transfers) > 0
    assert replica.timings.total_seconds >= replica.timings.skeleton_seconds
    assert (replica.max_context_tokens, replica.max_batch) == (512, 8)
    assert (replica.node_id, list(replica.devices)) == ("node-under-test", [1])
    assert replica.loaded_fraction == 1.0


async def test_greedy_tokens_equal_those_of_transformers_generate(serving: OneNode, tiny_model: Path) -> None:
    wanted = request("rep-shared", PROMPT, max_tokens=24, stop_token_ids=[1])

    assert await generate(serving, wanted) == reference(tiny_model, PROMPT, 24)


async def test_sessions_that_share_a_worker_do_not_disturb_each_other(serving: OneNode) -> None:
    prompts = [PROMPT[:length] for length in (2, 5, 8, 11)]
    alone = [await generate(serving, request("rep-shared", prompt)) for prompt in prompts]
    together = await asyncio.gather(
        *(
            generate(serving, request("rep-shared", prompt, session_id=f"ses-together-{index}"))
            for index, prompt in enumerate(prompts)
        )
    )

    assert together == alone


async def test_a_session_continues_after_tokens_generated_elsewhere(serving: OneNode) -> None:
    whole = await generate(serving, request("rep-shared", PROMPT, max_tokens=16, ignore_eos=True))
    wanted = request("rep-shared", PROMPT, max_tokens=16, ignore_eos=True)
    wanted.generated_token_ids.extend(whole[:7])
    positions, tokens = [], []
    async for event in serving.stub.Generate(wanted):
        positions.append(event.position)
        tokens += [token.id for token in event.tokens]

    assert positions[0] == 7
    assert tokens == whole[7:]


async def test_a_cancelled_call_ends_its_session_and_no_other(serving: OneNode) -> None:
    other = asyncio.ensure_future(
        generate(serving, request("rep-shared", PROMPT, max_tokens=200, ignore_eos=True))
    )
    call = serving.stub.Generate(request("rep-shared", PROMPT, max_tokens=480, ignore_eos=True))
    async for _ in call:
        break  # it runs beside the other
    call.cancel()
    assert len(await other) == 200
    await serving.listener.until(
        lambda report: all(r.running_sessions + r.waiting_sessions == 0 for r in report.replicas)
    )

    assert await generate(serving, request("rep-shared", PROMPT))


async def test_a_replica_that_is_not_here_is_gone(node: OneNode) -> None:
    with pytest.raises(ReplicaGone, match="not here"):
        await generate(node, request("rep-unknown", PROMPT))


@pytest.mark.parametrize(
    ("wanted", "error_code"),
    [
        (request("rep-shared", []), "invalid_request"),
        (request("rep-shared", [9999]), "invalid_request"),
        (request("rep-shared", PROMPT, max_tokens=4000), "context_length_exceeded"),
        (request("rep-shared", PROMPT, temperature=-1.0), "invalid_request"),
    ],
    ids=["no prompt", "token outside the vocabulary", "longer than the context", "negative temperature"],
)
async def test_what_no_model_can_do_is_refused_with_its_reason(
    serving: OneNode, wanted: session_pb2.GenerateRequest, error_code: str
) -> None:
    with pytest.raises(StokerError) as refused:
        await generate(serving, wanted)

    assert refused.value.code == error_code
    assert await generate(serving, request("rep-shared", PROMPT))


async def test_a_replica_with_a_session_is_not_stopped_as_idle(node: OneNode, tiny_model: Path) -> None:
    await ready(node, tiny_model, "rep-busy")
    call = node.stub.Generate(request("rep-busy", PROMPT, max_tokens=480, ignore_eos=True))
    async for _ in call:
        break
    with pytest.raises(ReplicaBusy), translated("node agent"):
        await node.stub.StopReplica(StopReplicaRequest(replica_id="rep-busy", only_if_idle=True, fence=1))
    call.cancel()
    await node.listener.until(lambda report: all(r.running_sessions == 0 for r in report.replicas))

    await node.stop_replica("rep-busy", only_if_idle=True)


async def test_an_order_of_a_controller_that_no_longer_leads_is_refused(
    node: OneNode, tiny_model: Path
) -> None:
    with pytest.raises(Fenced), translated("node agent"):
        await node.start_replica("rep-fenced", tiny_model, fence=0)


async def test_an_order_for_a_slot_that_does_not_exist_is_refused(node: OneNode, tiny_model: Path) -> None:
    with pytest.raises(CallerError, match="device 5"), translated("node agent"):
        await node.start_replica("rep-nowhere", tiny_model, device=5)


async def test_a_missing_checkpoint_fails_the_replica_and_its_worker_is_replaced(
    node: OneNode, tmp_path: Path
) -> None:
    await node.order("rep-missing", CheckpointInfo(uri=str(tmp_path / "nothing")), device=1)
    failed = await node.listener.replica("rep-missing", REPLICA_STATE_FAILED)

    assert failed.error_code == "not_found"
    assert "nothing" in failed.error_message
    await node.listener.until(lambda report: report.warm_workers > 0)


async def test_the_lines_of_a_replicas_worker_can_be_read(serving: OneNode) -> None:
    lines = [
        line.text
        async for line in serving.stub.ReadLogs(ReadLogsRequest(replica_id="rep-shared", tail_lines=10))
    ]

    assert any("service.started" in line for line in lines)


async def test_a_report_can_be_asked_for(node: OneNode) -> None:
    await node.listener.until(lambda report: report.warm_workers > 0)  # it names the architectures
    first = await node.stub.GetReport(GetReportRequest())
    second = await node.stub.GetReport(GetReportRequest())

    assert first.node_id == "node-under-test"
    assert [device.kind for device in first.devices] == ["cpu", "cpu"]
    assert "LlamaForCausalLM" in first.architectures
    assert first.store.pool.total_bytes > 0
    assert second.sequence > first.sequence


async def detailed(node: OneNode, replica_id: str) -> list[tuple[int, float]]:
    """Return the tokens of a sampled session with their log probabilities."""
    wanted = request(replica_id, PROMPT, max_tokens=24, temperature=1.0, ignore_eos=True, top_logprobs=1)
    return [(token.id, token.logprob) async for event in node.stub.Generate(wanted) for token in event.tokens]


async def test_a_killed_fork_server_harms_no_replica_and_is_started_again(
    node: OneNode, tiny_model: Path
) -> None:
    """A worker that is started directly meanwhile makes the same bits as one that was forked."""
    await ready(node, tiny_model, "rep-forked")
    report = await node.listener.until(lambda report: report.warm_workers == 1)
    server = await node.agent.wait_for_log("fork_server.ready")
    forked = await detailed(node, "rep-forked")
    os.kill(server["pid"], signal.SIGKILL)
    lost = await node.agent.wait_for_log("fork_server.lost")

    assert (lost["reason"], lost["was_ready"]) == ("killed by SIGKILL", True)
    assert await detailed(node, "rep-forked") == forked
    children = psutil.Process(node.agent.pid).children()
    workers = {child.pid for child in children if child.name() == "stoker-worker"}
    (pooled,) = workers - {replica.worker_pid for replica in report.replicas}
    os.kill(pooled, signal.SIGKILL)
    await node.agent.wait_for_log("worker.warmed", forked=False)
    await node.stop_replica("rep-forked")
    await ready(node, tiny_model, "rep-direct")
    assert await detailed(node, "rep-direct") == forked
    await node.agent.wait_for_log("fork_server.ready", nth=2)
