"""Random fault schedules: whatever happens, a stream is what it would have been, and no call stays open.

Nor does an owner of a session run where a later one has been: that is the epoch fence's doing. With it
switched off 21 of the first 600 schedules fail.

The gateway's own session, hops, moves and re-attachment run over toy replicas; a third of the streams loses
its gateway, to its death or to a pause after which it goes on beside its successor. More seeds, and files of
those that fail: `python -m tests.simulation.streams --seeds 20000 --write tests/simulation/streams`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import uvloop

from tests.simulation.streams.schedules import Outcome, Schedule, play

SEEDS = 2_000


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """Write no logs: they cost as much as all the rest."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


async def play_all() -> list[Outcome]:
    """Play the schedule of each seed; fails with the first that does not hold."""
    outcomes: list[Outcome] = []
    for seed in range(SEEDS):
        outcomes.append(await play(Schedule.of(seed)))
        assert outcomes[-1].wrong == "", (Schedule.of(seed), outcomes[-1].history)
    return outcomes


@pytest.mark.timeout(900)  # 24 s of processor time, and a busy machine gives it a tenth of that
def test_no_fault_schedule_changes_a_stream_or_leaves_a_call_open() -> None:
    outcomes = uvloop.run(play_all())  # in the same turns as asyncio's own loop, and cheaper

    seen = {event for outcome in outcomes for event in outcome.history}
    for what in ("source", "destination", "both", "connection", "controller"):
        for phase in ("ships", "begins", "has computed", "is held", "is switched"):
            assert f"{what} fails as a move {phase}" in seen
    for what in ("a gateway dies", "a gateway is paused", "the leader changes", "a zombie speaks"):
        assert what in seen
    assert max(outcome.hops for outcome in outcomes) >= 10
    assert max(outcome.moves for outcome in outcomes) >= 3
    assert sum(outcome.moves for outcome in outcomes) > 100
    assert sum(outcome.gateways for outcome in outcomes) > SEEDS * 5 // 4
    assert sum(outcome.found_tokens for outcome in outcomes) > SEEDS // 2


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("*.schedule")), ids=lambda path: path.stem)
async def test_no_schedule_that_once_failed_does_so_again(path: Path) -> None:
    outcome = await play(Schedule.read(path))

    assert outcome.wrong == "", outcome.history


async def test_a_schedule_that_was_written_plays_as_the_one_it_was(tmp_path: Path) -> None:
    schedule = Schedule.of(3)
    outcome = await play(schedule)

    path = schedule.write(tmp_path, outcome)

    assert Schedule.read(path) == schedule
    assert await play(Schedule.read(path)) == outcome
