"""Forked workers, real processes without imports: whose children they are, how their ends are seen."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from services.node_agent.workers import fork_server
from services.node_agent.workers.fork_server import ForkServer
from stoker.background import background

ROOT = Path(__file__).parents[3]
LIMIT_SECONDS = 60


@pytest.fixture(scope="module")
def agent() -> Iterator[subprocess.Popen[str]]:
    """Return a process that plays a node agent."""
    command = [sys.executable, "-m", "tests.integration.node_agent.toy_agent"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        yield running
        running.kill()


@pytest.fixture(scope="module")
def found(agent: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what it saw of its workers."""
    assert agent.stdout is not None
    seen: dict[str, Any] = json.loads(agent.stdout.readline())
    return seen


def test_a_forked_worker_is_the_agents_child_and_leads_a_session_of_its_own(found: dict[str, Any]) -> None:
    ids = found["who"]

    assert ids["parent"] == found["agent"]
    assert ids["group"] == ids["session"] == ids["pid"]


def test_its_exit_status_and_its_output_reach_the_agent(found: dict[str, Any]) -> None:
    assert found["exit"] == {"code": 3, "output": "ended with 3\n"}
    assert found["killed"] == -signal.SIGKILL


def test_an_error_in_a_worker_is_printed_and_ends_it_and_not_the_server(found: dict[str, Any]) -> None:
    assert found["raise"]["code"] == 1
    assert "RuntimeError: too hot" in found["raise"]["output"]


def test_two_workers_draw_different_random_numbers(found: dict[str, Any]) -> None:
    assert len(set(found["random"])) == 2


def test_a_worker_without_leave_to_go_on_ends_before_it_does_anything(found: dict[str, Any]) -> None:
    assert found["no leave"] == {"code": 1, "output": ""}


def test_a_worker_outlives_the_server_and_dies_with_the_agent(
    agent: subprocess.Popen[str], found: dict[str, Any]
) -> None:
    assert (found["server"], found["outlives"]["code"]) == (-signal.SIGKILL, None)
    worker = os.pidfd_open(found["outlives"]["pid"])
    try:
        agent.kill()

        readable, _, _ = select.select([worker], [], [], LIMIT_SECONDS)
        assert readable, "it still runs"
    finally:
        os.close(worker)


async def test_imports_begin_anew_where_their_niceness_cannot_be_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where an agent is not root: the first server is ended in the middle of its imports."""
    start, started, again = fork_server._Server.start, [], asyncio.Event()

    async def told(environment: Mapping[str, str], niceness: int) -> fork_server._Server:
        started.append(await start(environment, niceness))
        again.set() if len(started) > 1 else servers.hurry()
        return started[-1]

    monkeypatch.setattr(fork_server._Server, "start", told)
    monkeypatch.setattr(fork_server, "adopt_orphans", lambda: True)
    monkeypatch.setattr(fork_server, "give_way_no_more", lambda _pid: False)
    monkeypatch.setattr(fork_server, "PATIENCE_SECONDS", 0.05)
    async with background() as tasks:
        servers = ForkServer(dict(os.environ), lambda work, name: tasks.start(work, name=name))
        waiting = asyncio.ensure_future(servers.fork(["--help"], niceness=10))
        await again.wait()
        tasks.cancel()
    await asyncio.wait([waiting])

    assert isinstance(waiting.exception(), fork_server.NoForkServer)  # this agent has ended
    assert [await server._process.wait() for server in started] == [-signal.SIGKILL] * 2
