"""Stores that share over real sockets, with threads that read like those of a load; one counted origin."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from services.store.chain import FarFile
from services.store.integrity.digests import FileDigests
from services.store.peers.limits import Limits
from services.store.peers.service import Peers
from services.store.peers.wire import FileIdentity
from stoker.checkpoint.digests import digest
from stoker.checkpoint.reading import ReadPart
from stoker.cli.free_ports import free_ports
from stoker.errors import LoadFailed
from stoker.units import KIB

CHUNK = 256 * KIB
READ_THREADS = 4
PATIENT = Limits(
    dial_seconds=60.0,
    silence_seconds=60.0,
    stall_seconds=60.0,
    first_retry_seconds=0.02,
    longest_retry_seconds=0.1,
)
"""Nobody is given up because the machine is busy."""

QUICK = Limits(
    dial_seconds=2.0,
    silence_seconds=2.0,
    stall_seconds=0.5,
    first_retry_seconds=0.02,
    longest_retry_seconds=0.1,
)


class Origin:
    """Far bytes that are counted as they are read; a `ChunkSource`."""

    name = "origin"

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.reads: Counter[int] = Counter()
        self.read_bytes = 0
        self.pace = threading.Event()
        self.pace.set()
        self.at_chunk: dict[int, threading.Event] = {}
        self._lock = threading.Lock()

    def read(self, chunk: memoryview, *, offset: int, length: int) -> list[ReadPart]:
        """Copy the bytes; waits where a test holds a chunk back."""
        with self._lock:
            self.reads[offset // CHUNK] += 1
            self.read_bytes += length
        if (held := self.at_chunk.get(offset // CHUNK)) is not None:
            held.wait(30)
        chunk[:length] = self.content[offset : offset + length]
        return [ReadPart(tier="remote", byte_count=length, began_seconds=0.0, ended_seconds=0.0)]

    def close(self) -> None:
        """Nothing to close."""


@dataclass
class Store:
    """One store: its peers, and its pool."""

    peers: Peers
    address: str
    parts: list[ReadPart] = field(default_factory=list)
    memory: list[bytearray] = field(default_factory=list)
    arrived: int = 0

    def bytes_from(self, tier: str) -> int:
        """How much came from a tier."""
        return sum(part.byte_count for part in self.parts if part.tier == tier)

    def content(self, size: int) -> bytes:
        """What the pool holds."""
        return b"".join(self.memory)[:size]


class World:
    """A file and the stores that load it."""

    def __init__(self, chunks: int, *, tail: int = 1000, digests: bool = True) -> None:
        size = (chunks - 1) * CHUNK + tail
        self.content = np.random.default_rng(7).integers(0, 256, size, dtype=np.uint8).tobytes()
        self.origin = Origin(self.content)
        texts = tuple(digest(self.content[at : at + CHUNK]) for at in range(0, size, CHUNK))
        self.file = FarFile(
            uri="s3://bucket/model",
            revision="r1",
            name="model.safetensors",
            size_bytes=size,
            digests=FileDigests(size_bytes=size, part_bytes=CHUNK, texts=texts) if digests else None,
        )
        self.identity = FileIdentity(
            revision="r1", name="model.safetensors", size_bytes=size, chunk_bytes=CHUNK
        )
        self.stores: list[Store] = []
        self._threads = ThreadPoolExecutor(64)

    async def start(self, count: int, limits: Limits = QUICK) -> list[Store]:
        """Start stores that know of each other and are linked."""
        addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
        for address in addresses:
            peers = Peers(limits=limits)
            peers.start(address, addresses)
            self.stores.append(Store(peers=peers, address=address))
        await self.linked()
        return self.stores

    async def linked(self) -> None:
        """Wait until every store has a link to every other one."""
        async with asyncio.timeout(60):
            wanted = len(self.stores) - 1
            while any(len(store.peers.exchange._linked) < wanted for store in self.stores):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)

    def fill(self, store: Store) -> None:
        """Give a store all of the file, as a load that has ended would."""
        for index in range(self.identity.chunks):
            memory = bytearray(CHUNK)
            piece = self.content[index * CHUNK : (index + 1) * CHUNK]
            memory[: len(piece)] = piece
            store.memory.append(memory)
            store.peers.exchange.put(self.identity, 1, index, memoryview(memory))

    async def load(self, store: Store) -> None:
        """Load the file as the daemon does: threads that take chunks in order."""
        source = store.peers.source(self.file, self.origin, chunk_bytes=CHUNK)
        assert source is not None
        store.memory = [bytearray(CHUNK) for _ in range(self.identity.chunks)]
        left = iter(range(self.identity.chunks))
        lock = threading.Lock()

        def read() -> None:
            while True:
                with lock:
                    index = next(left, None)
                if index is None:
                    return
                view = memoryview(store.memory[index])
                parts = source.read(view, offset=index * CHUNK, length=self.identity.length(index))
                with lock:
                    store.parts += parts
                    store.arrived += 1
                store.peers.exchange.put(self.identity, 1, index, view)

        loop = asyncio.get_running_loop()
        try:
            await asyncio.gather(*(loop.run_in_executor(self._threads, read) for _ in range(READ_THREADS)))
        finally:
            source.close()

    async def try_load(self, store: Store) -> bool:
        """Load, and tell whether that went well."""
        try:
            await self.load(store)
        except LoadFailed:
            return False
        return True

    def holds_all(self, store: Store) -> bool:
        """Tell whether a store has the file, byte for byte."""
        return store.content(len(self.content)) == self.content

    async def close(self) -> None:
        """Stop everything."""
        for store in self.stores:
            await store.peers.close()
        self._threads.shutdown(wait=True, cancel_futures=True)


@asynccontextmanager
async def world(chunks: int = 24, **options) -> AsyncIterator[World]:
    """A file, and stores to be started."""
    made = World(chunks, **options)
    try:
        yield made
    finally:
        await made.close()
