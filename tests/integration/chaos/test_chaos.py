"""Real processes under load: a short storm; every service replaced in turn. `make chaos` is the long one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.storm import Account, Weather, brew
from tests.integration.tiny_model import make_tiny_model

SMALL = {"streams": 6, "nodes": 2, "requests": 6, "tokens": 60}


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for sockets."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


async def _brew(weather: Weather, folder: Path) -> Account:
    said: list[str] = []
    account = await brew(weather, make_tiny_model(folder / "model"), folder / "c", said.append)
    assert account.tally.lost == [], said
    assert account.tally.changed == [], said
    assert account.broken == [], said
    assert account.leaked == [], said
    assert account.tally.streams >= weather.streams, said
    return account


@pytest.mark.timeout(600)
async def test_no_kill_zombie_or_partition_changes_a_stream_or_leaves_anything_behind(
    short_path: Path,
) -> None:
    kinds = ("zombie agent", "kill worker", "kill store", "kill controller", "kill agent", "partition")
    account = await _brew(Weather(seconds=20, every_seconds=4, seed=4, kinds=kinds, **SMALL), short_path)

    assert account.faults["zombie agent"] + account.faults["partition"] > 0
    assert account.faults.total() >= 3


@pytest.mark.timeout(600)
async def test_no_client_notices_that_every_service_is_replaced_in_turn(short_path: Path) -> None:
    account = await _brew(Weather(seconds=300, rolling=True, **SMALL), short_path)

    assert account.faults["replaced"] == 7  # two gateways, a controller, two nodes with an agent and a store
