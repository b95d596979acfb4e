"""Sessions over a plain connection beside gRPC: when there is one, when it goes, and where there is none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from services.node_agent.sessions import session_listener
from services.node_agent.sessions.session_listener import TICKET_BYTES, SessionListener
from stoker.errors import ConfigError, PeerError
from stoker.frames import framed
from stoker.tcp import dial
from tests.integration.gateway.fake_cluster import FakeCluster, goes_on_with
from tests.integration.gateway.gateway_process import GatewayProcess

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
LIMIT_SECONDS = 60


@asynccontextmanager
async def serving(cluster: FakeCluster, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Run a gateway that knows a warm model."""
    cluster.controller.push(cluster.route("tiny"))
    async with (
        GatewayProcess(cluster.controller_address, folder) as process,
        httpx.AsyncClient(base_url=process.url, timeout=LIMIT_SECONDS) as http,
    ):
        await process.wait_for_log("routes.synced")
        yield http


async def ask(http: httpx.AsyncClient) -> str:
    """Return an answer's text."""
    answer = (await http.post(CHAT, json=BODY)).raise_for_status().json()
    return str(answer["choices"][0]["message"]["content"])


async def stream(http: httpx.AsyncClient) -> AsyncIterator[str]:
    """Yield the pieces of an answer as they come."""
    async with http.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and (choices := json.loads(line.removeprefix("data: "))["choices"]):
                yield choices[0]["delta"].get("content") or ""


async def until_linked(http: httpx.AsyncClient, cluster: FakeCluster) -> None:
    """Send requests until one has gone over a link."""
    linked = cluster.agent.linked
    async with asyncio.timeout(LIMIT_SECONDS):
        while cluster.agent.linked == linked:
            await ask(http)


async def test_sessions_go_over_one_link_and_on_elsewhere_when_it_is_lost(tmp_path: Path) -> None:
    async with FakeCluster() as cluster, serving(cluster, tmp_path) as http:
        await until_linked(http, cluster)
        linked, orders = cluster.agent.linked, len(cluster.agent.orders)
        answers = [await ask(http) for _ in range(3)]
        all_linked = cluster.agent.linked - linked == len(cluster.agent.orders) - orders == 3
        links = len(cluster.agent.links)

        cluster.agent.script = goes_on_with("on and on", stands_still_at=3)
        cluster.controller.may_start.set()  # another replica, for which the controller is asked
        said = ""
        async for text in stream(http):
            said += text
            if said == "on ":
                for link in cluster.agent.links:
                    link.cancel()

    assert answers == ["Hello!"] * 3
    assert all_linked
    assert links == 1
    assert said == "on and on"
    assert len(cluster.agent.orders[-1].generated_token_ids) == len("on ")


async def test_an_agent_of_before_gets_calls(tmp_path: Path) -> None:
    async with FakeCluster() as cluster:
        cluster.agent.has_links = False
        async with serving(cluster, tmp_path) as http:
            answers = [await ask(http) for _ in range(3)]

    assert answers == ["Hello!"] * 3
    assert (cluster.agent.linked, len(cluster.agent.orders)) == (0, 3)


@asynccontextmanager
async def listening(advertised: str = "") -> AsyncIterator[SessionListener]:
    """Run a listener."""
    listener = SessionListener("127.0.0.1:0", advertised)
    running = asyncio.create_task(listener.run())
    try:
        yield listener
    finally:
        running.cancel()
        await asyncio.wait([running])
        listener.close()


async def test_only_a_ticket_makes_a_connection_and_each_makes_one() -> None:
    async with listening() as listener, listener.offer() as offer:
        loop = asyncio.get_running_loop()
        for first in (framed(bytes(TICKET_BYTES)), framed(b"short"), b"\xff" * 64):
            with await dial(("127.0.0.1", listener.port)) as stranger:
                await loop.sock_sendall(stranger, first)
                assert await _ended(stranger)
        with await dial(("127.0.0.1", listener.port)) as connection:
            await loop.sock_sendall(connection, framed(offer.ticket) + framed(b"order"))
            with await offer.taken() as taken:
                assert await loop.sock_recv(taken, 64) == framed(b"order")
        with await dial(("127.0.0.1", listener.port)) as again:
            await loop.sock_sendall(again, framed(offer.ticket))
            assert await _ended(again)


async def test_a_stranger_that_says_nothing_or_says_it_too_slowly_is_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_listener, "GREET_SECONDS", 0.05)
    async with listening() as listener:
        address = ("127.0.0.1", listener.port)
        with await dial(address) as silent, await dial(address) as slow:
            await asyncio.get_running_loop().sock_sendall(slow, framed(bytes(TICKET_BYTES))[:-1])

            assert await _ended(silent)
            assert await _ended(slow)


async def test_strangers_beyond_the_limit_are_refused_until_others_have_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_listener, "MAX_STRANGERS", 2)
    async with listening() as listener, listener.offer() as offer, asyncio.timeout(LIMIT_SECONDS):
        address = ("127.0.0.1", listener.port)
        strangers = [await dial(address) for _ in range(3)]
        assert await _ended(strangers[2])
        assert not offer.connection.done()
        for stranger in strangers:
            stranger.close()
        while not offer.connection.done():  # the listener has to see that they have gone
            with await dial(address) as gateway:
                await asyncio.get_running_loop().sock_sendall(gateway, framed(offer.ticket))
                ended = asyncio.create_task(_ended(gateway))
                await asyncio.wait([ended, offer.connection], return_when=asyncio.FIRST_COMPLETED)
                ended.cancel()
                await asyncio.wait([ended])
        (await offer.taken()).close()


async def test_strangers_are_let_go_when_the_agent_ends() -> None:
    async with listening() as listener:
        stranger = await dial(("127.0.0.1", listener.port))
    with stranger:
        assert await _ended(stranger)


async def test_an_offer_that_nobody_takes_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_listener, "GREET_SECONDS", 0.01)
    async with listening("agent.example:7074") as listener, listener.offer() as offer:
        assert offer.address == "agent.example:7074"
        with pytest.raises(PeerError, match="no connection"):
            await offer.taken()


async def test_an_address_that_cannot_be_listened_on_is_named_with_its_setting() -> None:
    async with listening() as listener:
        with pytest.raises(ConfigError, match="STOKER_NODE_AGENT_SESSION_ADDRESS"):
            SessionListener(f"127.0.0.1:{listener.port}")


async def _ended(connection: object) -> bool:
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            return await asyncio.get_running_loop().sock_recv(connection, 1) == b""  # type: ignore[arg-type]
    except ConnectionResetError:
        return True
