"""Workers and agents that are killed, stopped or come in any order: real processes, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from services.node_agent.workers.session_socket import SUFFIX
from stoker.errors import Fenced, NotFound, ReplicaGone, StokerError, WorkerDied
from stoker.rpc import translated
from stoker.v1.node_agent_pb2 import REPLICA_STATE_FAILED, REPLICA_STATE_READY, REPLICA_STATE_STARTING
from stoker.v1.session_kv_pb2 import HoldSessionRequest
from tests.integration.node_agent.cluster import LONG_TOKENS, OneNode, request
from tests.integration.node_agent.processes import ServiceProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [5, 6, 7]
HANG_FOUND_SECONDS = 40
"""Far from what it takes, on a machine that does other things as well, and from gRPC's own minute."""


def workers_of(agent_pid: int) -> list[psutil.Process]:
    """Return the agent's child processes."""
    return psutil.Process(agent_pid).children(recursive=True)


def until_ended(processes: list[psutil.Process]) -> None:
    """Wait until each has ended; one that does not fails the test."""
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


async def test_a_worker_killed_while_loading_fails_its_replica_and_is_replaced(
    node: OneNode, tiny_model: Path
) -> None:
    await node.listener.until(lambda report: report.warm_workers == 1)
    info = await node.describe(tiny_model)
    node.store.send(signal.SIGSTOP)  # the load waits for ever
    await node.order("rep-loading", info)
    loading = await node.listener.until(lambda report: any(replica.worker_pid for replica in report.replicas))
    assert loading.replicas[0].state == REPLICA_STATE_STARTING
    os.kill(loading.replicas[0].worker_pid, signal.SIGKILL)
    failed = await node.listener.replica("rep-loading", REPLICA_STATE_FAILED)
    node.store.send(signal.SIGCONT)

    assert failed.error_code == "worker_died"
    assert "killed by SIGKILL" in failed.error_message
    await node.listener.until(lambda report: report.warm_workers == 1)
    await node.stop_replica("rep-loading")
    await node.order("rep-again", info)
    await node.listener.replica("rep-again", REPLICA_STATE_READY)


async def test_a_worker_killed_while_generating_ends_its_streams_with_an_error_and_is_replaced(
    node: OneNode, tiny_model: Path
) -> None:
    await node.start_replica("rep-1", tiny_model)
    replica = await node.listener.replica("rep-1", REPLICA_STATE_READY)
    call = node.stub.Generate(request("rep-1", PROMPT, max_tokens=500, ignore_eos=True))
    with pytest.raises(WorkerDied, match=r"is lost|killed by SIGKILL"), translated("node agent"):
        [os.kill(replica.worker_pid, signal.SIGKILL) async for event in call if event.position == 3]
    failed = await node.listener.replica("rep-1", REPLICA_STATE_FAILED)

    assert failed.error_code == "worker_died"
    await node.listener.until(lambda report: report.warm_workers == 1)


async def test_a_held_session_stands_still_alone_and_then_goes_on(node: OneNode, long_model: Path) -> None:
    await node.start_replica("rep-held", long_model)
    await node.listener.replica("rep-held", REPLICA_STATE_READY)
    asked = request("rep-held", PROMPT, session_id="ses-held", max_tokens=LONG_TOKENS, ignore_eos=True)
    call = node.stub.Generate(asked)
    events = aiter(call)
    tokens = [token.id for token in (await anext(events)).tokens]

    held = await node.stub.HoldSession(hold(seconds=5))
    others = node.stub.Generate(request("rep-held", PROMPT, max_tokens=4, ignore_eos=True))
    beside = [token.id async for event in others for token in event.tokens]
    still = await node.stub.HoldSession(hold(seconds=0))
    while len(tokens) < held.tokens - len(PROMPT) + 20:
        event = await anext(events)
        assert event.position == len(tokens)
        tokens += [token.id for token in event.tokens]
    refused = [await refusal(node, order) for order in (hold(epoch=2), hold("ses-x"), hold(at="rep-x"))]
    call.cancel()

    assert still.tokens == held.tokens > len(PROMPT)
    assert len(beside) == 4
    assert tokens[:4] == beside
    assert refused == [Fenced, NotFound, ReplicaGone]


def hold(
    session_id: str = "ses-held", *, at: str = "rep-held", epoch: int = 1, seconds: float = 1.0
) -> HoldSessionRequest:
    return HoldSessionRequest(session_id=session_id, replica_id=at, epoch=epoch, seconds=seconds)


async def refusal(node: OneNode, order: HoldSessionRequest) -> type[StokerError]:
    with pytest.raises(StokerError) as refused, translated("node agent"):
        await node.stub.HoldSession(order)
    return type(refused.value)


async def test_a_worker_that_hangs_in_the_middle_of_a_stream_is_found_in_seconds(
    node: OneNode, long_model: Path
) -> None:
    """By keep-alive, 6 to 9 s; a ping of gRPC's own once stood for it, which was waited for 60 s (0023)."""
    await node.start_replica("rep-hangs", long_model)
    replica = await node.listener.replica("rep-hangs", REPLICA_STATE_READY)
    call = node.stub.Generate(request("rep-hangs", PROMPT, max_tokens=LONG_TOKENS, ignore_eos=True))

    with pytest.raises(WorkerDied, match="is lost"), translated("node agent"):
        async with asyncio.timeout(HANG_FOUND_SECONDS):
            [os.kill(replica.worker_pid, signal.SIGSTOP) async for event in call if event.position == 3]
    failed = await node.listener.replica("rep-hangs", REPLICA_STATE_FAILED)

    assert failed.error_code == "worker_died"
    await node.listener.until(lambda report: report.warm_workers == 1)


async def test_sigterm_lets_sessions_end_and_leaves_no_process_and_no_socket(
    tmp_path: Path, tiny_model: Path
) -> None:
    async with OneNode(tmp_path, drain_seconds=30) as node:
        await node.start_replica("rep-1", tiny_model)
        await node.listener.replica("rep-1", REPLICA_STATE_READY)
        processes = workers_of(node.agent.pid)
        tokens = 0
        async for event in node.stub.Generate(request("rep-1", PROMPT, max_tokens=50, ignore_eos=True)):
            if event.position == 0:
                node.agent.send(signal.SIGTERM)
            tokens += len(event.tokens)

        assert tokens == 50
        assert await node.agent.ended() == 0
        until_ended(processes)
        assert list(node.run_dir.glob("worker-*")) == []


async def test_an_agent_serves_before_there_is_a_store_or_a_controller(tmp_path: Path) -> None:
    settings = {
        "address": "127.0.0.1:0",
        "run_dir": tmp_path / "run",
        "log_dir": tmp_path / "logs",
        "store": f"unix:{tmp_path}/nobody.sock",
        "controllers": [f"unix:{tmp_path}/nobody.sock"],
        "prestarted_workers": 0,
    }
    async with ServiceProcess("node_agent", **settings) as agent:
        await agent.wait_for_log("agent.listening")
        await agent.wait_for_log("controller.lost")


async def test_imports_that_fail_are_shown_by_the_fork_server_and_by_the_worker(tmp_path: Path) -> None:
    """A worker that can't be forked is started directly, and its own log says why."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('libkettle.so is missing')\n")
    settings = {
        "address": "127.0.0.1:0",
        "run_dir": tmp_path / "run",
        "log_dir": tmp_path / "logs",
        "controllers": [],
        "worker_env": {"PYTHONPATH": str(tmp_path / "broken")},
    }
    async with ServiceProcess("node_agent", **settings) as agent:
        lost = await agent.wait_for_log("fork_server.lost")
        await agent.wait_for_log("worker.ended")

        assert not lost["was_ready"]
        assert "libkettle.so is missing" in lost["output"]
        printed = [path.read_text() for path in (tmp_path / "logs").glob("worker-*.log")]
        assert any("libkettle.so is missing" in text for text in printed)


async def test_workers_die_with_an_agent_that_is_killed_and_the_next_agent_removes_their_sockets(
    shared_node: OneNode, tmp_path: Path
) -> None:
    """Last of this file: it kills the agent that the others share."""
    await shared_node.listener.until(lambda report: report.warm_workers == 1)
    processes = workers_of(shared_node.agent.pid)
    assert len(processes) >= 2  # the fork server and a worker
    shared_node.agent.send(signal.SIGKILL)
    await shared_node.agent.ended()
    await asyncio.to_thread(until_ended, processes)
    sockets = list(shared_node.run_dir.glob("worker-*.sock"))
    assert sockets
    for path in sockets:
        path.with_suffix(SUFFIX).touch()  # as if each had been killed while it loaded a model
    stale = list(shared_node.run_dir.glob("worker-*"))
    settings = {"address": "127.0.0.1:0", "run_dir": shared_node.run_dir, "log_dir": tmp_path / "logs"}
    async with ServiceProcess("node_agent", **settings, controllers=[], prestarted_workers=0):
        assert not any(path.exists() for path in stale)
