"""A file that several stores load at once, as a `ChunkSource`: peers, and one's own share of the origin."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.store.chain import GaveWay
from services.store.integrity.digests import Damage, FileDigests, PartCheck, check_chunk, damaged
from services.store.peers import metrics
from services.store.peers.arriving import Arriving
from services.store.peers.exchange import Exchange, raw_digest
from services.store.peers.fetching import Fault, FetchFailed, PeerConnections
from services.store.peers.limits import Limits
from services.store.peers.shared_file import Loader
from services.store.peers.swarm import Choice, FileSwarm
from services.store.peers.wire import FileIdentity, StoreId
from services.store.reading.chunk_source import ChunkSource, reads_gradually
from stoker import log
from stoker.checkpoint.reading import ReadPart
from stoker.errors import LoadFailed

PEER = "peer"
_LOOK_AGAIN_SECONDS = 0.25
"""While waiting for peers: patience runs out without anything happening."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Got:
    """A chunk that is here.

    Attributes:
        supplier: Who sent it; None = the origin.
        piece: Its bytes.
        arriving: What others hear of its fetch, where it is a first copy.
        parts: What came.
    """

    supplier: StoreId | None
    piece: memoryview
    arriving: Arriving | None
    parts: list[ReadPart]


class SwarmSource:
    """One file being loaded; see `ChunkSource`. Used from reader threads."""

    def __init__(  # noqa: PLR0913 - the parts it joins
        self,
        identity: FileIdentity,
        swarm: FileSwarm,
        origin: ChunkSource,
        digests: FileDigests | None,
        *,
        loader: Loader,
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
            loader: That has the swarm.
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
        self._loader = loader
        self._wanted: set[int] = set()
        self._granted: dict[int, Choice] = {}

    @property
    def name(self) -> str:
        """See `ChunkSource`."""
        return f"peers and {self._origin.name}"

    def read(self, chunk: memoryview, *, offset: int, length: int) -> list[ReadPart]:
        """See `ChunkSource`: waits until it is this chunk's turn, from a peer or from the origin."""
        return self.read_run([chunk], offset=offset, length=length)

    def read_run(self, chunks: Sequence[memoryview], *, offset: int, length: int) -> list[ReadPart]:
        """See `RunSource`; what is sent on while it arrives is called whole when its digest is right."""
        size = len(chunks[0])
        got: list[_Got] = []
        sound = False
        try:
            for number, chunk in enumerate(chunks):
                at = number * size
                piece = chunk[: min(size, length - at)]
                got.append(self._get(chunk, piece, offset + at, alone=len(chunks) == 1))
            parts = [part for each in got for part in each.parts]
            if len(chunks) > 1:
                parts += self._check_run(chunks, got, offset)
            sound = True
        finally:
            for each in got:
                if each.arriving is not None:
                    each.arriving.end(whole=sound)
        return parts

    def close(self) -> None:
        """See `ChunkSource`; the origin stays open."""
        self._loader.over.set()
        self._exchange.leave(self._identity.file_id, self._loader)

    def _choose(self, index: int) -> Choice:
        """Wait for this chunk's turn among all that threads want now; a turn may come to another thread."""
        exchange = self._exchange
        with exchange.changed:
            self._wanted.add(index)
            try:
                while (choice := self._granted.pop(index, None)) is None:
                    if self._loader.over.is_set():
                        raise GaveWay(f"{self.name} are read by another load of this store from now on")
                    if exchange.closed:
                        raise LoadFailed(f"{self.name}: the store is being stopped")
                    self._grant(index)
            finally:
                self._wanted.discard(index)
        if choice.claimed:
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
        if not done and choice.claimed:
            self._exchange.tell(self._identity.file_id)

    def _get(self, chunk: memoryview, piece: memoryview, offset: int, *, alone: bool) -> _Got:
        """Get one chunk from whoever gives it.

        Args:
            chunk: Room of the pool.
            piece: Its part that the file fills.
            offset: In the file.
            alone: It can be checked by itself, so it may be sent on before it is whole.
        """
        index = offset // self._identity.chunk_bytes
        with self._exchange.changed:
            self._swarm.release(index, self._exchange.now(), done=False)  # asked for again: it was not right
        while True:
            choice = self._choose(index)
            arriving = None
            if choice.claimed:
                arriving = self._exchange.begin(self._identity.file_id, index, piece)
            told = arriving.advance if arriving is not None and alone else _nobody
            done = False
            try:
                if choice.peer is None:
                    parts = self._from_origin(chunk, piece, offset, told)
                else:
                    parts = [self._from_peer(choice, choice.peer, piece, offset, told)]
                done = True
            except FetchFailed as error:
                self._failed(choice, error)
            else:
                return _Got(supplier=choice.peer, piece=piece, arriving=arriving, parts=parts)
            finally:
                if arriving is not None and not done:
                    arriving.end(whole=False)
                self._release(choice, done=done)

    def _from_origin(
        self, chunk: memoryview, piece: memoryview, offset: int, told: Callable[[int], None]
    ) -> list[ReadPart]:
        origin = self._origin
        if reads_gradually(origin):
            parts = origin.read_gradually(chunk, offset=offset, length=len(piece), told=told)
        else:
            parts = origin.read(chunk, offset=offset, length=len(piece))
        if self._digests is not None:
            damages = check_chunk(piece, self._digests, offset=offset, length=len(piece))
            if damages:
                raise damaged(origin.name, damages, advice="it is asked again")
        metrics.CHUNKS.labels(source="origin").inc()
        return parts

    def _from_peer(
        self, choice: Choice, peer: StoreId, piece: memoryview, offset: int, told: Callable[[int], None]
    ) -> ReadPart:
        began_seconds = time.monotonic()
        digests = self._digests
        inside = digests is not None and bool(digests.inside(offset, offset + len(piece)))
        self._connections.fetch(
            peer, self._identity.file_id, choice.index, piece, want_digest=not inside, told=told
        )
        if digests is not None:
            damages = check_chunk(piece, digests, offset=offset, length=len(piece))
            if damages:
                error = damaged(f"what store {peer} sent", damages, advice="it is not asked again")
                raise FetchFailed(error.message, Fault.LYING)
        metrics.CHUNKS.labels(source="seed" if choice.first_copy else "rival").inc()
        return ReadPart(
            tier=PEER, byte_count=len(piece), began_seconds=began_seconds, ended_seconds=time.monotonic()
        )

    def _check_run(self, chunks: Sequence[memoryview], got: Sequence[_Got], offset: int) -> list[ReadPart]:
        """Check digests that span chunks; where one is wrong read the origin and ban those who lied."""
        if self._digests is None or not self._damages(self._digests, got, offset):
            return []
        before = [raw_digest(each.piece) for each in got]
        parts: list[ReadPart] = []
        for number, (chunk, each) in enumerate(zip(chunks, got, strict=True)):
            at = offset + number * len(chunks[0])
            parts += self._origin.read(chunk, offset=at, length=len(each.piece))
            metrics.CHUNKS.labels(source="origin").inc()
        damages = self._damages(self._digests, got, offset)
        if damages:
            raise damaged(self._origin.name, damages, advice="it is asked again")
        liars = {
            each.supplier
            for each, digest in zip(got, before, strict=True)
            if each.supplier is not None and raw_digest(each.piece) != digest
        }
        for liar in liars:
            error = FetchFailed(
                f"what it sent of bytes from {offset:,} on is not what was written", Fault.LYING
            )
            self._drop(liar, error, float("inf"))
        return parts

    @staticmethod
    def _damages(digests: FileDigests, got: Sequence[_Got], offset: int) -> list[Damage]:
        check, at, damages = PartCheck(digests), offset, list[Damage]()
        for each in got:
            damages += check.arrived(each.piece, offset=at, length=len(each.piece))[1]
            at += len(each.piece)
        return damages

    def _failed(self, choice: Choice, error: FetchFailed) -> None:
        """Do without a peer that failed; the chunk is chosen again, from somebody else."""
        if choice.peer is None:
            return
        if error.fault is Fault.REFUSED:
            with self._exchange.changed:
                self._swarm.refused(choice.peer, choice.index)
            return
        forever = error.fault is Fault.LYING
        self._drop(choice.peer, error, float("inf") if forever else self._limits.drop_seconds)

    def _drop(self, peer: StoreId, error: FetchFailed, seconds: float) -> None:
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


def _nobody(_: int) -> None:
    """Nobody is told of bytes that can't be checked before others are there."""
