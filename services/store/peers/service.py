"""The parts that share checkpoints with other stores, and their order of life."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from services.store.chain import FarFile, run_chunks
from services.store.peers.exchange import Exchange, FindOnDisk
from services.store.peers.fetching import PeerConnections
from services.store.peers.limits import Limits
from services.store.peers.links import Links
from services.store.peers.server import PeerServer
from services.store.peers.shared_file import DiskCopy, Loader
from services.store.peers.source import SwarmSource
from services.store.peers.wire import MAX_CHUNK_BYTES, MAX_CHUNKS, FileIdentity, StoreId
from services.store.reading.chunk_source import ChunkSource
from stoker import log
from stoker.errors import ConfigError, InvalidRequest
from stoker.tcp import parse_address


class Peers:
    """Shares what is in the pool, and loads together with others. Used from the event loop.

    Attributes:
        exchange: What is shared; loads put their chunks there.
    """

    def __init__(self, *, find_on_disk: FindOnDisk | None = None, limits: Limits | None = None) -> None:
        """Args: find_on_disk: files that peers may have although they are not in the pool."""
        self._limits = limits or Limits()
        store = StoreId(secrets.token_hex(8))
        self.exchange = Exchange(store, find_on_disk=find_on_disk or _nothing_on_disk)
        self._connections = PeerConnections(store, self._limits)
        self._links = Links(self.exchange, self._connections, limits=self._limits)
        self._server = PeerServer(self.exchange, limits=self._limits, seen=self._links.seen)
        self._tasks: list[asyncio.Task[None]] = []
        self._static: frozenset[tuple[str, int]] = frozenset()
        self.address = ""
        """Where other hosts reach this store, as the cluster names it; empty = they are not told."""

    @property
    def port(self) -> int:
        """Where peers reach this store."""
        return self._server.port

    def start(self, address: str, peers: Sequence[str], *, advertised: str = "") -> None:
        """Listen on `address` (`host:port`) and link to `peers` (the same), for as long as it lives.

        Args:
            address: Where it listens.
            peers: Linked to whatever `set_peers` says.
            advertised: Where others reach it; empty = where it listens.

        Raises:
            ConfigError: It can't listen there, or a peer's address is none.
        """
        try:
            self._static = frozenset(map(parse_address, peers))
        except InvalidRequest as error:
            raise ConfigError(f"{error.message}; see STOKER_STORE_PEERS") from error
        self._server.bind(address)
        self._links.port = self._server.port
        self.address = advertised or _reachable(address, self._server.port)
        self._links.set_peers(self._static)
        self._tasks = [
            asyncio.create_task(self._server.serve(), name="peer-server"),
            asyncio.create_task(self._links.run(), name="peer-links"),
        ]
        for task in self._tasks:
            task.add_done_callback(_report_crash)
        log.get().info("peers.opened", address=address, port=self.port, store=self.exchange.me)

    def set_peers(self, peers: Sequence[str]) -> None:
        """Link to these peers and to those of the settings, and to no others.

        Raises:
            InvalidRequest: An address is none; nothing changes then.
        """
        self._links.set_peers(self._static | frozenset(map(parse_address, peers)))

    def source(
        self, file: FarFile, origin: ChunkSource, *, chunk_bytes: int, gives_way: bool = False
    ) -> ChunkSource | None:
        """Return a source that shares the work with other stores that load `file`; does not block.

        Args:
            file: Which.
            origin: Where its bytes are, for this store's share; closed by the caller.
            chunk_bytes: Of the pool.
            gives_way: Another load of the file takes it over; reads raise `GaveWay` then.

        Returns:
            None where there is nothing to share: an empty file, one in too many chunks, or one that another
            load of this store has in hand.
        """
        if not self._tasks or not 0 < file.size_bytes <= MAX_CHUNKS * chunk_bytes:
            return None
        if chunk_bytes > MAX_CHUNK_BYTES:
            return None
        identity = FileIdentity(
            revision=file.revision, name=file.name, size_bytes=file.size_bytes, chunk_bytes=chunk_bytes
        )
        loader = Loader(gives_way=gives_way)
        swarm = self.exchange.join(identity, run_chunks=run_chunks(file, chunk_bytes), loader=loader)
        if swarm is None:
            return None
        return SwarmSource(
            identity,
            swarm,
            origin,
            file.digests,
            loader=loader,
            exchange=self.exchange,
            connections=self._connections,
            limits=self._limits,
        )

    async def close(self) -> None:
        """End all links and connections; loads that wait for peers fail."""
        self.exchange.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []
        self._connections.close()


def _reachable(address: str, port: int) -> str:
    """Return an address with the port that it got; nothing when it means all interfaces."""
    host = address.rpartition(":")[0]
    return "" if host in {"0.0.0.0", "[::]", "::"} else f"{host}:{port}"


def _report_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.get().error("peers.crashed", part=task.get_name(), exc_info=task.exception())


def _nothing_on_disk(_: FileIdentity) -> DiskCopy | None:
    return None
