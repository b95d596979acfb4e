"""This store's side of the control connections: dials its peers, asks what they have, hears what changes.

A peer is dialled for as long as it is on the list, however often it comes and goes. A store that dials this
one and is not on the list is dialled back at the address it came from, until that fails.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable

from services.store.peers import metrics
from services.store.peers.exchange import Exchange
from services.store.peers.fetching import PeerConnections
from services.store.peers.limits import Limits
from services.store.peers.sockets import receive, send
from services.store.peers.wire import (
    FileId,
    FileIdentity,
    Hello,
    Interest,
    Leave,
    Ping,
    Purpose,
    Refused,
    State,
    StoreId,
)
from stoker import log
from stoker.background import background
from stoker.errors import PeerError
from stoker.tcp import Address, dial

_LEARNT_TRIES = 3


class Links:
    """Connections to peers; used from the event loop.

    Args:
        exchange: Told of what peers say.
        connections: Told where peers are.
        limits: How many peers, how long.
    """

    def __init__(self, exchange: Exchange, connections: PeerConnections, *, limits: Limits) -> None:
        self._exchange = exchange
        self._connections = connections
        self._limits = limits
        self._listed: frozenset[Address] = frozenset()
        self._tasks: dict[Address, asyncio.Task[None]] = {}
        self._stores: dict[StoreId, Address] = {}
        self._own: set[Address] = set()
        self._woken: dict[Address, asyncio.Event] = {}
        self._changed: set[asyncio.Event] = set()
        self._group: asyncio.TaskGroup | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.port = 0
        """Where this store listens, as told to peers."""

    async def run(self) -> None:
        """Keep the links up until cancelled."""
        self._loop = asyncio.get_running_loop()
        self._exchange.listen(self._files_changed)
        async with asyncio.TaskGroup() as self._group:
            self.set_peers(self._listed)
            await asyncio.get_running_loop().create_future()  # until cancelled, and the links with it

    def set_peers(self, addresses: Iterable[Address]) -> None:
        """Change the list: new peers are dialled; those no longer on it are let go once their links break.

        A controller that has just started names few stores, and loads are under way.
        """
        self._listed = frozenset(addresses)
        if len(self._listed) > self._limits.max_links:
            log.get().warning("peers.too_many", listed=len(self._listed), dialled=self._limits.max_links)
            self._listed = frozenset(sorted(self._listed)[: self._limits.max_links])
        for address in self._listed:
            self._start(address)

    def seen(self, store: StoreId, address: Address) -> None:
        """Dial back a store that came in, at once, unless there is a link to it."""
        if store in self._stores:
            return
        if address in self._woken:
            self._woken[address].set()
        elif len(self._tasks) < self._limits.max_links:
            self._start(address)

    def _start(self, address: Address) -> None:
        if self._group is None or address in self._tasks or address in self._own:
            return
        task = self._group.create_task(self._keep(address), name=f"peer {address[0]}:{address[1]}")
        self._tasks[address] = task

        def ended(_: asyncio.Task[None]) -> None:
            if self._tasks.get(address) is task:
                del self._tasks[address]

        task.add_done_callback(ended)

    async def _keep(self, address: Address) -> None:
        """Link to one peer for as long as it is listed, or for a few tries when it isn't."""
        limits = self._limits
        woken = self._woken[address] = asyncio.Event()
        retry_seconds, failures, said = limits.first_retry_seconds, 0, ""
        try:
            while address not in self._own and (address in self._listed or failures < _LEARNT_TRIES):
                woken.clear()
                linked, message = await self._try(address)
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    return  # a task group loses the cancellation when a child fails at the same time
                if linked:
                    retry_seconds, failures, said = limits.first_retry_seconds, 0, ""
                else:
                    failures += 1
                if message and message != said:
                    log.get().info("peer.unlinked", address=f"{address[0]}:{address[1]}", reason=message)
                    said = message
                try:
                    async with asyncio.timeout(retry_seconds):
                        await woken.wait()
                except TimeoutError:
                    retry_seconds = min(2 * retry_seconds, limits.longest_retry_seconds)
        finally:
            del self._woken[address]

    async def _try(self, address: Address) -> tuple[bool, str]:
        """Dial and stay; returns whether there was a link, and why there is none any more."""
        linked = False
        try:
            async with asyncio.timeout(self._limits.dial_seconds):
                connection = await dial(address)
            with connection:
                hello = await self._greet(connection)
                if hello.store == self._exchange.me:
                    self._own.add(address)
                    return False, ""
                if hello.store in self._stores:
                    return False, "there is a link to this store already"
                linked = True
                await self._linked(connection, hello.store, address)
        except (OSError, PeerError) as error:
            return linked, str(error)
        except TimeoutError:
            return linked, "no sign of life in time"
        except Exception as error:  # noqa: BLE001 - the boundary of a link's task: the others go on
            log.get().error("peer.crashed", address=f"{address[0]}:{address[1]}", exc_info=error)
        return linked, ""

    async def _greet(self, connection: socket.socket) -> Hello:
        async with asyncio.timeout(self._limits.dial_seconds):
            await send(connection, Hello(purpose=Purpose.CONTROL, store=self._exchange.me, port=self.port))
            hello = await receive(connection)
        if isinstance(hello, Refused):
            raise PeerError(hello.reason)
        if not isinstance(hello, Hello):
            raise PeerError(f"it greets with a {type(hello).__name__}")
        return hello

    async def _linked(self, connection: socket.socket, store: StoreId, address: Address) -> None:
        self._stores[store] = address
        self._connections.known(store, address)
        self._exchange.linked(store)
        metrics.LINKS.inc()
        log.get().info("peer.linked", address=f"{address[0]}:{address[1]}", store=store)
        try:
            async with background() as tasks:
                tasks.start(self._ask(connection), name="peer-ask")
                await self._hear(connection, store)
        finally:
            metrics.LINKS.dec()
            del self._stores[store]
            self._exchange.unlinked(store)
            self._connections.forget(store)

    async def _hear(self, connection: socket.socket, store: StoreId) -> None:
        """Take in what the peer tells; ends by raising."""
        while True:
            async with asyncio.timeout(self._limits.silence_seconds):
                message = await receive(connection)
            match message:
                case State():
                    self._exchange.update(store, message)
                case Ping():
                    pass
                case _:
                    raise PeerError(f"a {type(message).__name__} on a control connection")

    async def _ask(self, connection: socket.socket) -> None:
        """Ask for what this store is loading, and take it back when it isn't any more."""
        changed = asyncio.Event()
        self._changed.add(changed)
        asked: dict[FileId, FileIdentity] = {}
        try:
            while True:
                wanted = {identity.file_id: identity for identity in self._exchange.loading()}
                for file_id in asked.keys() - wanted.keys():
                    await send(connection, Leave(file_id=file_id))
                for file_id in wanted.keys() - asked.keys():
                    await send(connection, Interest(file=wanted[file_id], loading=True))
                asked = wanted
                await changed.wait()
                changed.clear()
        finally:
            self._changed.discard(changed)

    def _files_changed(self, _: FileId) -> None:
        """Called from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for changed in self._changed:
            changed.set()
