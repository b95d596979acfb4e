"""When a fork server is started again, and when there is none."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import pytest

from services.node_agent.workers import fork_server
from services.node_agent.workers.fork_server import (
    LONGEST_PAUSE_SECONDS,
    ForkServer,
    NoForkServer,
    pause_seconds,
)
from services.node_agent.workers.priority import give_way_no_more
from services.node_agent.workers.worker_process import worker_environment
from stoker.background import background


def test_a_server_that_was_ready_before_it_was_lost_is_started_again_without_a_pause() -> None:
    assert pause_seconds(0) == 0


def test_servers_that_never_become_ready_are_started_more_and_more_rarely() -> None:
    assert [pause_seconds(failed) for failed in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert pause_seconds(10_000) == LONGEST_PAUSE_SECONDS


async def test_a_fork_server_that_is_turned_off_starts_nothing() -> None:
    started: list[str] = []

    def spawn(work: Coroutine[Any, Any, None], name: str) -> None:
        work.close()
        started.append(name)

    with pytest.raises(NoForkServer):
        await ForkServer({}, spawn, enabled=False).fork(["--socket", "/s"], niceness=0)
    assert started == []


def test_a_workers_environment_limits_the_threads_of_every_library_that_would_start_some() -> None:
    environment = worker_environment(threads=3, further={"HF_HUB_OFFLINE": "1"})

    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["OPENBLAS_NUM_THREADS"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_the_operators_own_variables_win() -> None:
    assert worker_environment(threads=3, further={"OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "2"


class FakeServer:
    """A server whose imports end only at once, without niceness; `started` has the niceness of each."""

    started: list[int]
    greets_late: bool
    """Its greeting comes in the moment in which it is ended."""
    pid = 1

    def __init__(self, niceness: int) -> None:
        self.niceness = niceness
        self._ended = asyncio.Event()

    @classmethod
    async def start(cls, environment: Mapping[str, str], niceness: int) -> FakeServer:
        """Start one."""
        del environment
        cls.started.append(niceness)
        return cls(niceness)

    async def greeting(self) -> bool:
        """Wait for its imports."""
        if self.niceness:
            await self._ended.wait()
            return self.greets_late
        return True

    async def fork(self, arguments: Sequence[str]) -> str:
        """Name a worker."""
        return f"{arguments[0]} of niceness {self.niceness}"

    async def ended(self, output: bytearray) -> str:
        """Wait for its end."""
        del output
        await self._ended.wait()
        return "ended"

    def kill(self) -> None:
        """End it."""
        self._ended.set()

    def close(self) -> None:
        """End it, and its channel."""
        self.kill()


@pytest.mark.parametrize(("order_first", "greets_late"), [(False, False), (True, False), (True, True)])
async def test_imports_that_an_order_waits_for_begin_anew_where_niceness_cannot_be_taken_back(
    monkeypatch: pytest.MonkeyPatch, *, order_first: bool, greets_late: bool
) -> None:
    FakeServer.started, FakeServer.greets_late = [], greets_late
    monkeypatch.setattr(fork_server, "_Server", FakeServer)
    monkeypatch.setattr(fork_server, "adopt_orphans", lambda: True)
    monkeypatch.setattr(fork_server, "give_way_no_more", lambda _pid: False)
    monkeypatch.setattr(fork_server, "PATIENCE_SECONDS", 0.0)
    async with background() as tasks:
        servers = ForkServer({}, lambda work, name: tasks.start(work, name=name))
        waiting = asyncio.ensure_future(servers.fork(["pool"], niceness=10))
        await asyncio.sleep(0)
        if order_first:
            servers.hurry()
        for _ in range(10):
            await asyncio.sleep(0)
        servers.hurry()

        assert await waiting == "pool of niceness 0"
        tasks.cancel()
    assert FakeServer.started == [10, 0]


def test_a_thread_that_gave_way_gives_way_no_more_where_that_is_allowed() -> None:
    own, niced, done = os.getpriority(os.PRIO_PROCESS, 0), threading.Event(), threading.Event()
    threads: list[int] = []

    def wait() -> None:
        threads.append(threading.get_native_id())
        os.setpriority(os.PRIO_PROCESS, threads[0], min(19, own + 1))
        niced.set()
        done.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    niced.wait()
    try:
        allowed = give_way_no_more(os.getpid())

        assert (os.getpriority(os.PRIO_PROCESS, threads[0]) == own) == (allowed or own == 19)
    finally:
        done.set()
        thread.join()


def test_a_process_that_has_ended_is_no_error() -> None:
    assert give_way_no_more(2**22 + 1)
