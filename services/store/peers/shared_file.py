"""A file as the exchange knows it: which chunks are here, on their way here, on disk, or being sent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from services.store.peers.arriving import Arriving
from services.store.peers.swarm import FileSwarm
from services.store.peers.wire import FileIdentity, State, StoreId


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCopy:
    """A file of this host that peers may have, without it being in the pool.

    Attributes:
        locate: Tells where it lies now: a copy under way moves when it is whole. Its size is the identity's.
        have: Bits of the chunks that are there and right.
    """

    locate: Callable[[], Path]
    have: int


@dataclass(slots=True, kw_only=True, eq=False)
class Loader:
    """A load of this store that has a file's swarm; of several only one has.

    Attributes:
        gives_way: Another load takes the swarm over: this one was asked for by nobody who waits to run.
        over: Set when it has ended, or has given way: its threads wait for peers no longer.
    """

    gives_way: bool = False
    over: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Borrowed:
    """A chunk that may be sent until it is given back.

    Attributes:
        memory: Its bytes in the pool; None = it is on disk.
        arriving: Set when they aren't all there yet.
        copy: Where on disk; None = it is in the pool.
        offset: In the file.
        length: Bytes.
    """

    memory: memoryview | None
    copy: DiskCopy | None
    offset: int
    length: int
    arriving: Arriving | None = None


@dataclass(slots=True, kw_only=True)
class SharedFile:
    """A file that is here, on its way here, or asked for by peers.

    Attributes:
        identity: Which.
        holder: Whose chunks of the pool it has: a resident's key.
        memory: Chunks in the pool.
        arriving: Chunks that this store is fetching the first copies of.
        digests: Of those, where one was asked for.
        copy: On this host's disk.
        swarm: Set while this store is loading it.
        loader: Who has the swarm.
        loading_peers: Who asked for it because they load it, for a load that begins later.
        subscribers: Who is told of its state; loading or not.
        borrowed: Chunks of the pool that are being sent.
        idle: Called when the last of them is back: of those who want its memory.
    """

    identity: FileIdentity
    holder: int | None = None
    memory: dict[int, memoryview] = field(default_factory=dict)
    arriving: dict[int, Arriving] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    copy: DiskCopy | None = None
    swarm: FileSwarm | None = None
    loader: Loader | None = None
    loading_peers: set[StoreId] = field(default_factory=set)
    subscribers: int = 0
    borrowed: int = 0
    idle: list[Callable[[], None]] = field(default_factory=list)

    def have(self) -> int:
        """Bits of the chunks that peers can have."""
        bits = 0 if self.copy is None else self.copy.have
        if self.swarm is not None:
            bits |= self.swarm.have
        elif len(self.memory) == self.identity.chunks:
            bits = (1 << self.identity.chunks) - 1
        else:
            for index in self.memory:
                bits |= 1 << index
        return bits

    def needed(self) -> bool:
        """Tell whether anyone has to do with it still."""
        return bool(self.holder is not None or self.swarm is not None or self.subscribers or self.borrowed)

    def state(self) -> State:
        """Return what peers are told of it."""
        return State(
            file_id=self.identity.file_id,
            loading=self.swarm is not None,
            chunks=self.identity.chunks,
            have=self.have(),
            fetching=0 if self.swarm is None else self.swarm.fetching,
        )

    def on_disk(self, index: int) -> Borrowed | None:
        """Return a chunk as it lies on this host's disk; None where that lacks it."""
        if self.copy is None or not self.copy.have >> index & 1:
            return None
        return Borrowed(
            memory=None,
            copy=self.copy,
            offset=index * self.identity.chunk_bytes,
            length=self.identity.length(index),
        )

    def end_arriving(self) -> None:
        """Tell those who send chunks on that nothing more of them comes."""
        for arriving in self.arriving.values():
            arriving.end(whole=False)
        self.arriving.clear()
