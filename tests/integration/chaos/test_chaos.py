"""Real processes under load, faults and an upgrade: `make chaos` for less than a minute."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.chaos.storm import Weather, brew
from tests.integration.tiny_model import make_tiny_model

KINDS = ("zombie agent", "kill worker", "kill gateway", "move, kill source", "kill store", "kill controller")


@pytest.mark.timeout(900)
async def test_neither_faults_nor_an_upgrade_change_a_stream_or_leave_anything_behind() -> None:
    said: list[str] = []
    weather = Weather(
        seconds=12, every_seconds=2.5, seed=4, kinds=KINDS, streams=4, nodes=2, requests=5, tokens=60,
        rest_seconds=0.7, rolling=True, one_of_each=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:  # short: sockets
        folder = Path(name)
        account = await brew(weather, make_tiny_model(folder / "model"), folder / "c", said.append)

    assert account.tally.lost == [], said
    assert account.tally.changed == [], said
    assert account.broken == [], said
    assert account.leaked == [], said
    assert account.tally.streams >= weather.streams, said
    assert account.tally.by_grpc, said
    assert account.faults["replace"] == 4  # a gateway, a controller, a node's agent and its store
    assert account.faults.total() >= 6, said  # those four, and two faults at least
