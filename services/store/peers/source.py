"""A file that several stores load at once, as a `ChunkSource`: peers, and one's own share of the origin."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from services.store.integrity import FileDigests, check_chunk, damaged
from services.store.peers import metrics
from services.store.peers.exchange import Exchange
from services.store.peers.fetching import Fault, FetchFailed, PeerConnections
from services.store.peers.limits import Limits
from services.store.peers.swarm import Choice, FileSwarm
from services.store.peers.wire import FileIdentity, StoreId
from stoker import log
from stoker.checkpoint.reading import ReadPart
from stoker.errors import LoadFailed

if TYPE_CHECKING:
    from services.store.chunk_source import ChunkSource

PEER = "peer"
_LOOK_AGAIN_SECONDS = 0.25
"""While waiting for peers: patience runs out without anything happening."""


class SwarmSource:
    """One file being loaded; see `ChunkSource`. Used from reader threads."""

    def __init__(  # noqa: PLR0913 - the parts it joins
        self,
        identity: FileIdentity,
        swarm: FileSwarm,
        origin: ChunkSource,
        digests: FileDigests | None,
        *,
        exchange: Exchange,
        connections: PeerConnections,
        limits: Limits,
    ) -> None:
        """Join the parts.

        Args:
            identity: Which file.
            swarm: Its decisions; guarded by the exchange's lock.
            origin: Where first copies come from; stays open when this is closed.
            digests: What its bytes must have; None = peers' own digests are believed.
            exchange: What is shared.
            connections: To peers.
            limits: How long a peer is not asked again.
        """
        self._identity = identity
        self._swarm = swarm
        self._origin = origin
        self._digests = digests
        self._exchange = exchange
        self._connections = connections
        self._limits = limits
        self._closed = threading.Event()
        self._wanted: set[int] = set()
        self._granted: dict[int, Choice] = {}

    @property
    def name(self) -> str:
        """See `ChunkSource`."""
        return f"peers and {self._origin.name}"

    def read(self, chunk: memoryview, *, offset: int, length: int) -> list[ReadPart]:
        """See `ChunkSource`: waits while a peer fetches the chunk, then gets it from there."""
        index = offset // self._identity.chunk_bytes
        with self._exchange.changed:
            self._swarm.release(index, self._exchange.now(), done=False)  # asked for again: it was not right
        while True:
            choice = self._choose(index)
            done = False
            try:
                if choice.peer is None:
                    parts = self._origin.read(chunk, offset=offset, length=length)
                    metrics.CHUNKS.labels(source="origin").inc()
                else:
                    parts = [self._fetch(choice, choice.peer, chunk[:length], offset)]
                    metrics.CHUNKS.labels(source="seed" if choice.first_copy else "rival").inc()
                done = True
            except FetchFailed as error:
                self._drop(choice.peer, error)
            else:
                return parts
            finally:
                self._release(choice, done=done)

    def close(self) -> None:
        """See `ChunkSource`; the origin stays open."""
        if not self._closed.is_set():
            self._closed.set()
            self._exchange.leave(self._identity.file_id)

    def _choose(self, index: int) -> Choice:
        """Wait for this chunk's turn among all that threads want now; a turn may come to another thread."""
        exchange = self._exchange
        with exchange.changed:
            self._wanted.add(index)
            try:
                while (choice := self._granted.pop(index, None)) is None:
                    if self._closed.is_set() or exchange.closed:
                        raise LoadFailed(f"{self.name}: the store is being stopped")
                    self._grant(index)
            finally:
                self._wanted.discard(index)
        if choice.first_copy:
            exchange.tell(self._identity.file_id)
        return choice

    def _grant(self, index: int) -> None:
        granted = self._swarm.choose(sorted(self._wanted), self._exchange.now())
        if granted is None:
            self._exchange.changed.wait(_LOOK_AGAIN_SECONDS)
            return
        self._granted[granted.index] = granted
        self._wanted.discard(granted.index)
        if granted.index != index:
            self._exchange.changed.notify_all()

    def _release(self, choice: Choice, *, done: bool) -> None:
        with self._exchange.changed:
            self._swarm.release(choice.index, self._exchange.now(), done=done)
            self._exchange.changed.notify_all()
        if not done and choice.first_copy:
            self._exchange.tell(self._identity.file_id)

    def _fetch(self, choice: Choice, peer: StoreId, into: memoryview, offset: int) -> ReadPart:
        began_seconds = time.monotonic()
        digests = self._digests
        inside = digests is not None and bool(digests.inside(offset, offset + len(into)))
        self._connections.fetch(peer, self._identity.file_id, choice.index, into, want_digest=not inside)
        if digests is not None:
            damages = check_chunk(into, digests, offset=offset, length=len(into))
            if damages:
                error = damaged(f"what store {peer} sent", damages, advice="it is not asked again")
                raise FetchFailed(error.message, Fault.LYING)
        return ReadPart(
            tier=PEER,
            byte_count=len(into),
            began_seconds=began_seconds,
            ended_seconds=time.monotonic(),
        )

    def _drop(self, peer: StoreId | None, error: FetchFailed) -> None:
        """Do without a peer that failed; the chunk is chosen again, from somebody else."""
        if peer is None:
            return
        seconds = {
            Fault.LYING: float("inf"),
            Fault.REFUSED: _LOOK_AGAIN_SECONDS,  # its next state says what it still has
        }.get(error.fault, self._limits.drop_seconds)
        with self._exchange.changed:
            self._swarm.drop(peer, until_seconds=self._exchange.now() + seconds)
        metrics.DROPPED.labels(reason=error.fault.value).inc()
        log.get().warning(
            "peer.dropped",
            store=peer,
            file=self._identity.name,
            revision=self._identity.revision,
            reason=error.fault.value,
            message=error.message,
            seconds=seconds if seconds < float("inf") else None,
        )
