"""Stores over real sockets: the origin is read once, and a peer that fails is replaced."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import replace
from typing import Self

import pytest

from services.store.integrity.digests import FileDigests
from services.store.peers import exchange, swarm
from services.store.peers.exchange import raw_digest
from services.store.peers.service import Peers
from services.store.peers.shared_file import DiskCopy
from services.store.peers.sockets import receive, send
from services.store.peers.wire import (
    HEAD,
    Arriving,
    Chunk,
    FileId,
    Hello,
    Interest,
    Part,
    Purpose,
    Refused,
    Request,
    State,
    StoreId,
    body_length,
    decode,
    encode,
)
from stoker.checkpoint.digests import digest
from stoker.tcp import parse_address
from tests.integration.store.peers.fleet import CHUNK, PATIENT, QUICK, Store, World, world


@pytest.fixture
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores that share wait for each other, however busy the machine is: the origin's reads are counted."""
    monkeypatch.setattr(swarm, "SETTLE_SECONDS", 60.0)
    monkeypatch.setattr(swarm, "PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr(swarm, "UNCLAIMED_PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr(exchange, "_BEGIN_SECONDS", 60.0)


async def until(condition) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - other threads make it so
            await asyncio.sleep(0.005)


def once(made: World) -> dict[int, int]:
    """Every chunk read once."""
    return dict.fromkeys(range(made.identity.chunks), 1)


@pytest.mark.usefixtures("_patience")
@pytest.mark.parametrize("digests", [True, False])
async def test_three_stores_that_ask_at_once_read_the_origin_once(digests):
    async with world(digests=digests) as made:
        stores = await made.start(3, PATIENT)
        await asyncio.gather(*map(made.load, stores))

        assert all(map(made.holds_all, stores))
        assert made.origin.reads == once(made)
        assert made.origin.read_bytes == len(made.content)
        assert sum(store.bytes_from("peer") for store in stores) == 2 * len(made.content)


@pytest.mark.usefixtures("_patience")
async def test_a_store_that_joins_late_gets_what_is_there_from_its_peers():
    async with world() as made:
        first, second = await made.start(2, PATIENT)
        await made.load(first)
        await made.load(second)

        assert made.holds_all(second)
        assert second.bytes_from("peer") == len(made.content)
        assert made.origin.reads == once(made)


@pytest.mark.usefixtures("_patience")
async def test_stores_that_nobody_told_of_each_other_in_both_ways_still_share():
    async with world() as made:
        (first,) = await made.start(1, PATIENT)
        peers = Peers(limits=PATIENT)
        peers.start("127.0.0.1:0", [first.address])  # the first one has never heard of it
        second = Store(peers=peers, address="")
        made.stores.append(second)
        await made.linked()
        await asyncio.gather(made.load(first), made.load(second))

        assert made.origin.reads == once(made)


async def test_a_peer_that_dies_half_way_is_replaced():
    async with world(chunks=40) as made:
        stores = await made.start(3)
        dying = stores[2]
        loads = [asyncio.create_task(made.try_load(store)) for store in stores]
        await until(lambda: dying.arrived >= 10)
        before = made.origin.read_bytes
        await dying.peers.close()
        ended = await asyncio.gather(*loads)

        assert ended[:2] == [True, True]
        assert made.holds_all(stores[0])
        assert made.holds_all(stores[1])
        assert before > 0
        assert made.origin.read_bytes < 2 * len(made.content)  # nobody started again


class Impostor:
    """A peer that says it has everything, and then misbehaves."""

    def __init__(self, made: World, behave) -> None:
        self.made = made
        self.behave = behave
        self.asked = 0
        self.address = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_) -> None:
        self._server.close()

    async def _serve(self, reader, writer) -> None:
        async def hear():
            head = await reader.readexactly(HEAD.size)
            return decode(head, await reader.readexactly(body_length(head)))

        try:
            hello = await hear()
            writer.write(encode(Hello(purpose=hello.purpose, store=StoreId("impostor"), port=0)))
            while True:
                message = await hear()
                if isinstance(message, Interest):
                    file = message.file
                    everything = (1 << file.chunks) - 1
                    writer.write(
                        encode(
                            State(
                                file_id=file.file_id,
                                loading=False,
                                chunks=file.chunks,
                                have=everything,
                                fetching=0,
                            )
                        )
                    )
                elif isinstance(message, Request):
                    self.asked += 1
                    await self.behave(self.made, message, writer, encode)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def lie(made: World, request: Request, writer, encode) -> None:
    """Send wrong bytes with a digest of other ones."""
    length = made.identity.length(request.index)
    writer.write(encode(Chunk(length=length, digest=b"\1" * 16)) + bytes(length))


async def stall(made: World, request: Request, writer, encode) -> None:
    """Send half of the chunk, then nothing."""
    length = made.identity.length(request.index)
    writer.write(encode(Chunk(length=length, digest=b"\1" * 16)) + bytes(length // 2))


async def hang_up(made: World, request: Request, writer, encode) -> None:
    """Close in the middle of a chunk."""
    length = made.identity.length(request.index)
    writer.write(encode(Chunk(length=length, digest=b"\1" * 16)) + bytes(length // 2))
    await writer.drain()
    writer.close()


async def too_long(made: World, request: Request, writer, encode) -> None:
    """Announce more than a chunk."""
    writer.write(encode(Chunk(length=2 * CHUNK, digest=b"\1" * 16)))


async def nonsense(made: World, request: Request, writer, encode) -> None:
    """Answer with something that is no message."""
    writer.write(struct.pack("<BI", 200, 2**31))


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("behave", [lie, stall, hang_up, too_long, nonsense], ids=lambda it: it.__name__)
async def test_a_peer_that_misbehaves_is_dropped_and_replaced(behave, digests):
    async with world(chunks=12, digests=digests) as made, Impostor(made, behave) as impostor:
        (store,) = await made.start(1, QUICK)
        store.peers.set_peers([impostor.address])
        await until(lambda: "impostor" in store.peers.exchange._linked)
        await made.load(store)

        assert made.holds_all(store)
        assert 1 <= impostor.asked <= 4  # one per reader thread at most: nobody asks again
        assert made.origin.reads == once(made)


async def trickle(made: World, request: Request, writer, encode) -> None:
    """Send a little, again and again: never silent, and far below the slowest rate."""
    writer.write(encode(Chunk(length=made.identity.length(request.index), digest=b"\1" * 16)))
    while True:
        writer.write(bytes(100))
        await writer.drain()
        await asyncio.sleep(0.05)


async def trickle_on(made: World, request: Request, writer, encode) -> None:
    """The same, as of a chunk that is on its way to the sender."""
    writer.write(encode(Arriving(length=made.identity.length(request.index))))
    while True:
        writer.write(encode(Part(length=100)) + bytes(100))
        await writer.drain()
        await asyncio.sleep(0.05)


async def only_signs_of_life(made: World, request: Request, writer, encode) -> None:
    """Say that the chunk is on its way, for ever."""
    writer.write(encode(Arriving(length=made.identity.length(request.index))))
    while True:
        writer.write(encode(Part(length=0)))
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("behave", [trickle, trickle_on, only_signs_of_life], ids=lambda it: it.__name__)
async def test_a_peer_that_trickles_below_the_slowest_rate_is_dropped(behave):
    async with world(chunks=6) as made, Impostor(made, behave) as impostor:
        (store,) = await made.start(1, replace(QUICK, arriving_factor=2.0, pause_seconds=0.5))
        store.peers.set_peers([impostor.address])
        await until(lambda: "impostor" in store.peers.exchange._linked)
        await made.load(store)

        assert made.holds_all(store)
        assert 1 <= impostor.asked <= 4
        assert made.origin.reads == once(made)


async def lie_well(made: World, request: Request, writer, encode) -> None:
    """Send wrong bytes with their own right digest."""
    wrong = bytes(made.identity.length(request.index))
    writer.write(encode(Chunk(length=len(wrong), digest=raw_digest(wrong))) + wrong)


async def test_a_peer_that_lies_about_a_digest_of_several_chunks_is_banned():
    async with world(chunks=4, tail=CHUNK, digests=False) as made, Impostor(made, lie_well) as impostor:
        part, size = 2 * CHUNK, len(made.content)
        texts = tuple(digest(made.content[at : at + part]) for at in range(0, size, part))
        digests = FileDigests(size_bytes=size, part_bytes=part, texts=texts)
        (store,) = await made.start(1)
        store.peers.set_peers([impostor.address])
        await until(lambda: "impostor" in store.peers.exchange._linked)
        source = store.peers.source(replace(made.file, digests=digests), made.origin, chunk_bytes=CHUNK)
        told = next(iter(store.peers.exchange._files.values())).swarm
        await until(lambda: told.settled(0.0) and told.peers["impostor"].have)
        got = []
        for at in range(0, size, part):
            chunks = [memoryview(bytearray(CHUNK)) for _ in range(2)]
            await asyncio.to_thread(source.read_run, chunks, offset=at, length=part)
            got += chunks
        source.close()

        assert b"".join(got) == made.content
        assert impostor.asked == 2  # the two chunks of the first digest
        assert told.peers["impostor"].unusable_until_seconds == float("inf")


async def refuse(made: World, request: Request, writer, encode) -> None:
    """Say that it has gone."""
    writer.write(encode(Refused(reason="it is not here any more")))


async def test_a_peer_that_has_a_chunk_no_more_is_not_a_reason_to_fail():
    async with world(chunks=6) as made, Impostor(made, refuse) as impostor:
        (store,) = await made.start(1)
        store.peers.set_peers([impostor.address])
        await until(lambda: "impostor" in store.peers.exchange._linked)
        await made.load(store)

        assert made.holds_all(store)


async def dialled(address: str) -> socket.socket:
    """A bare connection to a store."""
    connection = socket.socket()
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, parse_address(address))
    return connection


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\0" * 64,
        struct.pack("<BI", 0, 2**32 - 1),
        struct.pack("<BI", 3, 16) + bytes(16),
    ],
)
async def test_who_speaks_something_else_is_let_go_and_the_store_goes_on(said):
    async with world(chunks=2) as made:
        (store,) = await made.start(1)
        with await dialled(store.address) as stranger:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(stranger, said)
            async with asyncio.timeout(60):
                with suppress(ConnectionResetError):
                    assert await loop.sock_recv(stranger, 100) == b""
        await made.load(store)

        assert made.holds_all(store)


async def test_connections_for_chunks_are_bounded():
    async with world(chunks=2) as made:
        (store,) = await made.start(1, replace(QUICK, max_senders=2))
        connections = [await dialled(store.address) for _ in range(3)]
        answers = []
        for number, connection in enumerate(connections):
            await send(connection, Hello(purpose=Purpose.DATA, store=StoreId(f"p{number}"), port=0))
            answers.append(await receive(connection))
        for connection in connections:
            connection.close()

        assert [type(answer) for answer in answers] == [Hello, Hello, Refused]


async def test_a_chunk_of_a_file_nobody_named_is_refused():
    async with world(chunks=2) as made:
        (store,) = await made.start(1)
        made.fill(store)
        with await dialled(store.address) as stranger:
            await send(stranger, Hello(purpose=Purpose.DATA, store=StoreId("p"), port=0))
            await receive(stranger)
            await send(stranger, Request(file_id=FileId(bytes(16)), index=0, want_digest=False))

            assert isinstance(await receive(stranger), Refused)


async def test_a_file_on_disk_is_sent_without_being_in_the_pool(tmp_path):
    for digests in (True, False):
        async with world(chunks=6, digests=digests) as made:
            path = tmp_path / "model.safetensors"
            path.write_bytes(made.content)
            first, second = await made.start(2)
            everything = (1 << made.identity.chunks) - 1
            first.peers.exchange._find_on_disk = lambda _, at=path, have=everything: DiskCopy(
                locate=lambda: at, have=have
            )
            await made.load(second)

            assert made.holds_all(second)
            assert not made.origin.reads


async def test_a_load_that_waits_for_peers_ends_with_the_store():
    async with world(chunks=8) as made:
        stores = await made.start(2)
        made.origin.at_chunk = {index: threading.Event() for index in range(8)}
        loads = [asyncio.create_task(made.try_load(store)) for store in stores]
        await until(lambda: made.origin.reads)
        await stores[0].peers.close()
        for held in made.origin.at_chunk.values():
            held.set()

        assert await asyncio.gather(*loads) == [False, True]
