"""Channels to node agents: as many are kept as may be, those in use in any case."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.gateway.routing import agents as module
from services.gateway.routing.agents import Agents
from stoker.v1.node_agent_pb2 import FindSessionsResponse


class PlayedChannel:
    """A channel whose calls last until the test lets them go on."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.closed = False

    def _method(self, *_: object, **__: object) -> Any:
        return self._call

    unary_unary = unary_stream = stream_unary = stream_stream = _method

    async def _call(self, *_: object, **__: object) -> FindSessionsResponse:
        await self.goes_on.wait()
        assert not self.closed, "closed under a call"
        return FindSessionsResponse()

    async def close(self) -> None:
        """See `grpc.aio.Channel`."""
        self.closed = True


@pytest.fixture
def channels(monkeypatch: pytest.MonkeyPatch) -> dict[str, PlayedChannel]:
    """Return the channels that are made, the latest of each address; two may be kept."""
    made: dict[str, PlayedChannel] = {}

    def connect(address: str) -> PlayedChannel:
        made[address] = PlayedChannel(address)
        return made[address]

    monkeypatch.setattr(module.rpc, "connect", connect)
    monkeypatch.setattr(module, "MAX_AGENTS", 2)
    return made


async def ask(agents: Agents, address: str) -> None:
    await agents.find_sessions(address, ["s"], timeout_seconds=1.0)


async def test_the_agent_that_was_used_longest_ago_goes_for_a_new_one(
    channels: dict[str, PlayedChannel],
) -> None:
    agents = Agents()
    for address in ("a", "b", "a", "c"):
        await ask(agents, address)
    await asyncio.sleep(0)

    assert [channels[address].closed for address in "abc"] == [False, True, False]
    await agents.close()
    assert all(channel.closed for channel in channels.values())


async def test_an_agent_in_use_stays_whatever_comes(channels: dict[str, PlayedChannel]) -> None:
    agents = Agents()
    await ask(agents, "a")
    channels["a"].goes_on.clear()
    asking = asyncio.create_task(ask(agents, "a"))
    await asyncio.sleep(0)
    for address in ("b", "c", "d"):
        await ask(agents, address)
    channels["a"].goes_on.set()

    await asking
    assert [channels[address].closed for address in "abcd"] == [False, True, True, False]
    await agents.close()
    assert all(channel.closed for channel in channels.values())
