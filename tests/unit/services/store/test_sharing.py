"""Loads and what peers are sent of them: real memory, no sockets."""

from __future__ import annotations

import asyncio

from services.store.peers.exchange import Exchange
from services.store.peers.wire import FileIdentity, StoreId
from services.store.sharing import Sharing
from tests.unit.services.store.checkpoints import write_checkpoint
from tests.unit.services.store.test_loads import CHUNK, store


def identity_of(resident) -> FileIdentity:
    """The resident's only file, as peers know it."""
    (file,) = resident.entry.index.files
    return FileIdentity(
        revision=resident.entry.index.revision,
        name=file.name,
        size_bytes=file.size_bytes,
        chunk_bytes=CHUNK,
    )


def share(made) -> Exchange:
    """Share what a pool holds."""
    exchange = Exchange(StoreId("me"), find_on_disk=lambda _: None)
    made.loads._sharing = Sharing(exchange, chunk_bytes=CHUNK)
    return exchange


async def test_a_loaded_checkpoint_is_shared_byte_for_byte(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=100_003)
    async with store() as made:
        exchange = share(made)
        identity = identity_of(await made.load(folder))

        sent = bytearray()
        for index in range(identity.chunks):
            with exchange.borrow(identity.file_id, index) as chunk:
                sent += chunk.memory
        assert sent == (folder / "model.safetensors").read_bytes()


async def test_an_evicted_checkpoint_is_not_shared_any_more(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=100_003)
    async with store() as made:
        exchange = share(made)
        identity = identity_of(await made.load(folder))
        made.loads.evict(str(folder))

        assert exchange.state(identity.file_id) is None
        assert made.loads.chunks.free_count == 8


async def test_room_that_is_being_sent_from_is_free_when_that_has_ended(tmp_path):
    folder = write_checkpoint(tmp_path / "a", size=100_003)
    async with store() as made:
        exchange = share(made)
        identity = identity_of(await made.load(folder))
        with exchange.borrow(identity.file_id, 0):
            made.loads.evict(str(folder))
            assert made.loads.chunks.free_count == 8 - identity.chunks
        async with asyncio.timeout(10):
            with made.loads.changes.watched() as changed:
                while made.loads.chunks.free_count < 8:
                    await changed.wait()
                    changed.clear()

        assert made.loads.chunks.free_count == 8


async def test_a_load_that_waits_for_room_begins_when_the_last_chunk_was_sent(tmp_path):
    first = write_checkpoint(tmp_path / "a", size=200_000)
    second = write_checkpoint(tmp_path / "b", size=200_000)
    async with store() as made:
        exchange = share(made)
        identity = identity_of(await made.load(first))
        with exchange.borrow(identity.file_id, 0):
            loading = asyncio.create_task(made.load(second))
            await asyncio.sleep(0)
            assert not loading.done()
        resident = await asyncio.wait_for(loading, 10)

        assert made.content(resident) == (second / "model.safetensors").read_bytes()
