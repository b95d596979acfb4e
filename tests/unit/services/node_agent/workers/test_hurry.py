"""Niceness is taken back as long as an order waits: imports may begin to give way after the order came."""

from __future__ import annotations

import asyncio

import pytest

from services.node_agent.workers import hurry
from services.node_agent.workers.hurry import Hurry


class FakeForkServer:
    """Counts how often it was told to hurry."""

    def __init__(self) -> None:
        self.hurried = 0

    def hurry(self) -> None:
        """Count."""
        self.hurried += 1


async def test_who_is_on_the_way_gives_way_no_more_however_late_it_began_to_while_an_order_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(hurry, "give_way_no_more", given_back.append)
    monkeypatch.setattr(hurry, "AGAIN_SECONDS", 0.0)
    looks, pids = iter((True, True, True, False)), iter(([], [7], [7, 8]))
    over = asyncio.Event()

    def is_needed() -> bool:
        waits = next(looks)
        if not waits:
            over.set()
        return waits

    server = FakeForkServer()
    wanted = Hurry(server, pids=lambda: next(pids), is_needed=is_needed)  # type: ignore[arg-type] # all it needs
    wanted.begin()
    wanted.begin()
    await over.wait()

    assert (server.hurried, given_back) == (3, [7, 7, 8])


async def test_nobody_is_hurried_where_no_order_waits_nor_after_the_agents_end() -> None:
    server, waits = FakeForkServer(), False
    wanted = Hurry(server, pids=list, is_needed=lambda: waits)  # type: ignore[arg-type] # as above
    wanted.begin()
    waits = True
    wanted.begin()
    wanted.end()
    await asyncio.sleep(0)

    assert server.hurried == 1
