"""When a fork server is started again, and when there is none."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest

from services.node_agent.workers.fork_server import (
    LONGEST_PAUSE_SECONDS,
    ForkServer,
    NoForkServer,
    pause_seconds,
)
from services.node_agent.workers.worker_process import worker_environment


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
