"""Threads that take what is queued, each read once."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from queue import SimpleQueue

import pytest

from services.store.reading.read_queue import Readers, Urgency

WAIT_SECONDS = 60.0


@dataclass(slots=True)
class Job:
    """A read that waits for the test."""

    load: int
    name: str
    may_end: threading.Event = field(default_factory=threading.Event)
    length: int = 1

    def run(self) -> list:
        """Do nothing, once allowed."""
        assert self.may_end.wait(WAIT_SECONDS)
        return []


@pytest.fixture
def ended():
    return SimpleQueue()


@pytest.fixture
def readers(ended):
    made = Readers(1, lambda job, _outcome: ended.put(job.name))
    yield made
    made.close(grace_seconds=WAIT_SECONDS)


def jobs(load: int, names: str) -> list[Job]:
    return [Job(load, name) for name in names]


def let(*some: Job) -> None:
    for job in some:
        job.may_end.set()


def test_reads_run_once_each_in_their_order(readers, ended):
    reads = jobs(1, "abc")

    readers.add(1, iter(reads), Urgency.DEMAND)
    let(*reads)

    assert [ended.get(timeout=WAIT_SECONDS) for _ in reads] == ["a", "b", "c"]


def test_reads_that_were_dropped_hold_up_none_that_come_later(readers, ended):
    (running,), dropped, (later,) = jobs(1, "a"), jobs(2, "bc"), jobs(3, "d")
    readers.add(1, [running], Urgency.DEMAND)
    readers.add(2, dropped, Urgency.DEMAND)

    assert readers.drop(2) == 2
    readers.add(3, [later], Urgency.DEMAND)
    let(running, later)

    assert [ended.get(timeout=WAIT_SECONDS) for _ in range(2)] == ["a", "d"]


def test_nothing_that_waits_is_begun_once_closed(ended):
    readers = Readers(1, lambda job, _outcome: ended.put(job.name))
    running, waiting = jobs(1, "ab")
    readers.add(1, [running, waiting], Urgency.DEMAND)

    readers.close(grace_seconds=0.0)
    let(running, waiting)
    readers.close(grace_seconds=WAIT_SECONDS)

    assert "b" not in [ended.get_nowait() for _ in range(ended.qsize())]
    assert readers.waiting_bytes() >= waiting.length
