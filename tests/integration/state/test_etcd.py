"""The etcd backend keeps the protocol against a real etcd, also when etcd crashes, hangs or forgets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from contextlib import AbstractAsyncContextManager, aclosing
from typing import TYPE_CHECKING

import pytest

from stoker.cli.free_ports import free_ports
from stoker.errors import InvalidRequest
from stoker.state import (
    FencedState,
    LeaseLost,
    Put,
    StateStore,
    StateUnavailable,
    campaign,
    open_state,
    unchanged,
)
from tests.integration.etcd_server import EtcdServer, etcd_cluster, etcd_server
from tests.state_suite import TTL_SECONDS, StateSuite, existing, flat, following, put

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.state_suite import OpenStore

pytestmark = pytest.mark.etcd

prefixes = itertools.count()


class RealTime:
    """etcd's leases live by etcd's own clock, so here time really passes."""

    async def pass_seconds(self, seconds: float) -> None:
        """Wait; what the test then expects it awaits as an event."""
        await asyncio.sleep(seconds)


@pytest.fixture
def time() -> RealTime:
    return RealTime()


@pytest.fixture(scope="module")
def shared_server() -> Generator[EtcdServer, None, None]:
    with etcd_server() as server:
        yield server


@pytest.fixture
def server() -> Generator[EtcdServer, None, None]:
    """A server of this test's own, to be mistreated."""
    with etcd_server() as server:
        yield server


@pytest.fixture
def open_store(shared_server: EtcdServer) -> OpenStore:
    url = f"etcd://{shared_server.endpoint}/test-{next(prefixes)}"

    def opener() -> AbstractAsyncContextManager[StateStore]:
        return open_state(url)

    return opener


class TestEtcd(StateSuite):
    """The one suite, on a real etcd."""


async def test_two_prefixes_of_one_etcd_do_not_see_each_other(shared_server: EtcdServer) -> None:
    async with (
        open_state(f"etcd://{shared_server.endpoint}/one") as one,
        open_state(f"etcd://{shared_server.endpoint}/one2") as other,
    ):
        await put(one, "a")

        assert (await other.list("")).items == ()


async def test_without_a_prefix_the_whole_of_etcd_is_the_state(server: EtcdServer) -> None:
    async with open_state(f"etcd://{server.endpoint}") as store:
        await put(store, "a")
        await put(store, "ÿ/z")

        assert [item.key for item in (await store.list("")).items] == ["a", "ÿ/z"]


async def test_a_watch_survives_a_crash_of_etcd_without_losing_a_change(server: EtcdServer) -> None:
    async with open_state(f"etcd://{server.endpoint}/s") as store:
        start = await put(store, "a", b"0")
        async with aclosing(store.watch("a", after_revision=start)) as events:
            await put(store, "a", b"1")
            assert flat(await following(events)) == [("a", b"1")]
            await put(store, "a", b"2")
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            await put(store, "a", b"3")

            assert flat(await following(events)) == [("a", b"2")]
            assert flat(await following(events)) == [("a", b"3")]


async def test_a_watch_opened_while_etcd_is_down_begins_when_it_is_back(server: EtcdServer) -> None:
    async with open_state(f"etcd://{server.endpoint}/s") as store:
        await put(store, "a")
        snapshot = await store.list("a")
        await asyncio.to_thread(server.kill)
        async with aclosing(store.watch("a")) as events:
            first = asyncio.create_task(following(events))
            await asyncio.to_thread(server.start)

            assert (await first).revision == snapshot.revision


async def test_calls_fail_within_their_timeout_while_etcd_is_down_and_work_when_it_is_back(
    server: EtcdServer,
) -> None:
    async with open_state(f"etcd://{server.endpoint}/s") as store:
        await put(store, "a")
        await asyncio.to_thread(server.kill)
        async with asyncio.timeout(10):
            with pytest.raises(StateUnavailable, match=server.endpoint):
                await store.get("a", timeout_seconds=0.5)
            with pytest.raises(StateUnavailable, match=server.endpoint):
                await store.transact([], [Put(key="a", value=b"")], timeout_seconds=0.5)
            with pytest.raises(StateUnavailable):
                await store.list("", timeout_seconds=0.5)
            with pytest.raises(StateUnavailable):
                await store.grant(TTL_SECONDS, timeout_seconds=0.5)
        await asyncio.to_thread(server.start)

        assert await store.get("a") is not None


async def test_calls_fail_within_their_timeout_while_etcd_is_silent(server: EtcdServer) -> None:
    async with open_state(f"etcd://{server.endpoint}/s") as store:
        await put(store, "a")
        server.pause()
        async with asyncio.timeout(10):
            with pytest.raises(StateUnavailable):
                await store.get("a", timeout_seconds=0.5)
            with pytest.raises(StateUnavailable):
                await store.transact([], [], timeout_seconds=0.5)
        server.resume()

        assert await store.get("a") is not None


async def test_the_holder_of_a_lease_knows_that_it_is_lost_while_etcd_is_silent(server: EtcdServer) -> None:
    async with open_state(f"etcd://{server.endpoint}/s") as store:
        lease = await store.grant(TTL_SECONDS)
        server.pause()
        with pytest.raises(LeaseLost, match="could not be renewed"):
            async with asyncio.timeout(20), lease.keep_alive():
                await asyncio.Event().wait()
        server.resume()


async def test_a_lease_is_kept_alive_through_a_crash_of_etcd(server: EtcdServer) -> None:
    async with open_state(f"etcd://{server.endpoint}/s") as store:
        lease = await store.grant(10)
        await put(store, "a", lease_id=lease.id)
        async with lease.keep_alive():
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            await store.renew(lease.id)

            assert (await existing(store, "a")).lease_id == lease.id


async def test_a_lease_expires_when_the_process_that_kept_it_alive_dies(shared_server: EtcdServer) -> None:
    url = f"etcd://{shared_server.endpoint}/holder"
    async with open_state(url) as store, aclosing(store.watch("a")) as events:
        await following(events)
        holder = await asyncio.to_thread(subprocess.Popen, [sys.executable, "-c", HOLDER, url])
        try:
            assert flat(await following(events)) == [("a", b"held")]
            await asyncio.sleep(TTL_SECONDS + 1)
            assert await store.get("a") is not None
            os.kill(holder.pid, signal.SIGKILL)

            assert flat(await following(events)) == [("a", None)]
        finally:
            holder.kill()
            holder.wait()


HOLDER = f"""
import asyncio, sys
from stoker.state import Put, open_state

async def hold(url):
    async with open_state(url) as store:
        lease = await store.grant({TTL_SECONDS})
        async with lease.keep_alive():
            await store.transact([], [Put(key="a", value=b"held", lease_id=lease.id)])
            await asyncio.Event().wait()

asyncio.run(hold(sys.argv[1]))
"""


async def test_a_dead_endpoint_among_several_costs_no_call(shared_server: EtcdServer) -> None:
    (dead,) = free_ports(1)
    async with open_state(f"etcd://127.0.0.1:{dead},{shared_server.endpoint}/several") as store:
        start = await put(store, "a", b"0")
        async with aclosing(store.watch("a", after_revision=start)) as events:
            await put(store, "a", b"1")

            assert flat(await following(events)) == [("a", b"1")]


async def test_a_leader_goes_on_leading_while_one_member_after_the_other_dies_and_returns() -> None:
    with etcd_cluster() as members:
        url = f"etcd://{','.join(member.endpoint for member in members)}/s"
        async with (
            open_state(url) as store,
            campaign(store, "leader", identity=b"a", ttl_seconds=10) as leader,
        ):
            start = await put(store, "n", b"start")
            async with aclosing(store.watch("n", after_revision=start)) as events:
                for number, member in enumerate(members):
                    await asyncio.to_thread(member.kill)
                    value = str(number).encode()
                    await until_written(leader, "n", value)
                    assert flat(await following(events)) == [("n", value)]
                    await asyncio.to_thread(member.launch, members)
                    await asyncio.to_thread(member.wait_until_ready)


async def until_written(leader: FencedState, key: str, value: bytes) -> None:
    """Write once, however often it takes to hear of it."""
    async with asyncio.timeout(20):
        while True:
            item = await existing(leader.store, key)
            if item.value == value:
                return
            with contextlib.suppress(StateUnavailable):
                await leader.transact([unchanged(item)], [Put(key=key, value=value)], timeout_seconds=2)


async def test_with_certificates_the_state_is_reached_over_tls_and_not_without() -> None:
    with etcd_server(tls=True) as server:
        folder = server.folder
        url = f"etcds://{server.endpoint}/s?ca={folder}/ca.pem"
        async with open_state(f"{url}&cert={folder}/cert.pem&key={folder}/key.pem") as store:
            revision = await put(store, "a")
            async with aclosing(store.watch("a", after_revision=revision - 1)) as events:
                assert flat(await following(events)) == [("a", b"v")]
        for refused in (url, f"etcd://{server.endpoint}/s"):
            async with open_state(refused) as store:
                with pytest.raises(StateUnavailable):
                    await store.get("a", timeout_seconds=1)


async def test_a_name_is_resolved(shared_server: EtcdServer) -> None:
    port = shared_server.endpoint.rpartition(":")[2]
    async with open_state(f"etcd://localhost:{port}/name") as store:
        await put(store, "a")


async def test_an_etcd_that_was_wiped_makes_a_watch_begin_anew(server: EtcdServer) -> None:
    async with open_state(f"etcd://{server.endpoint}/s") as store:
        for _ in range(5):
            known = await put(store, "a")
        async with aclosing(store.watch("a", after_revision=known)) as events:
            await put(store, "a")
            await following(events)
            await asyncio.to_thread(server.kill)
            server.folder = server.folder / "fresh"
            server.folder.mkdir()
            await asyncio.to_thread(server.start)
            event = await following(events)

        assert event.revision < known


async def test_what_etcd_itself_refuses_is_an_invalid_request(shared_server: EtcdServer) -> None:
    async with open_state(f"etcd://{shared_server.endpoint}/refused") as store:
        with pytest.raises(InvalidRequest):
            await store.transact([], [Put(key="k" * 2, value=b"x" * 999_999)])
