"""Where other stores come in: greets them, tells them of files, and starts a sender for those that fetch."""

from __future__ import annotations

import asyncio
import contextvars
import socket
import threading
from collections.abc import Callable

from services.store.peers import metrics
from services.store.peers.exchange import Exchange
from services.store.peers.limits import Limits
from services.store.peers.sending import Sender
from services.store.peers.sockets import receive, send
from services.store.peers.wire import (
    FileId,
    Hello,
    Interest,
    Leave,
    Message,
    Ping,
    Purpose,
    Refused,
    State,
    StoreId,
)
from stoker import log
from stoker.accepting import serve_connections
from stoker.background import background
from stoker.errors import ConfigError, InvalidRequest, PeerError
from stoker.tcp import Address, listen, parse_address, send_at_once

MAX_FILES_PER_PEER = 1024
"""Files that one peer may be told of at a time."""

_BACKLOG = 128
_SIGNS_PER_SILENCE = 4


class PeerServer:
    """The listening side; used from the event loop.

    Args:
        exchange: What is shared.
        limits: How many peers, how long.
        seen: Called with each store that comes in and the address where it says that it listens: the
            address it comes from, with its own port.
    """

    def __init__(
        self, exchange: Exchange, *, limits: Limits, seen: Callable[[StoreId, Address], None]
    ) -> None:
        self._exchange = exchange
        self._limits = limits
        self._seen = seen
        self._listener: socket.socket | None = None
        self._controls: dict[_Control, None] = {}
        self._senders: dict[socket.socket, threading.Thread] = {}
        self._greeting = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self.port = 0
        """Where it listens."""

    def bind(self, address: str) -> None:
        """Listen on `host:port`.

        Raises:
            ConfigError: That can't be; says why.
        """
        try:
            self._listener = listener = listen(parse_address(address), backlog=_BACKLOG)
        except (OSError, InvalidRequest) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"cannot listen for peers on {address}: {reason}; set STOKER_STORE_PEER_ADDRESS"
            ) from error
        self.port = listener.getsockname()[1]

    async def serve(self) -> None:
        """Accept until cancelled; ends all connections then."""
        if self._listener is None:
            raise ConfigError("the peer server is not bound")
        self._loop = asyncio.get_running_loop()
        self._exchange.listen(self._changed)
        try:
            await serve_connections(self._listener, self._serve_one, name="peers")
        finally:
            self._listener.close()
            for sender in list(self._senders):
                _shut(sender)

    async def _serve_one(self, connection: socket.socket, host: str) -> None:
        sending = False
        try:
            hello = await self._greet(connection)
            if hello.purpose is Purpose.CONTROL:
                await self._control(connection, hello, host)
            else:
                self._start_sender(connection)
                sending = True
        except (OSError, PeerError, TimeoutError) as error:
            log.get().info("peer.broken", peer_host=host, message=str(error) or "it said nothing in time")
        except Exception as error:  # noqa: BLE001 - the boundary of a connection's task
            log.get().error("peer.crashed", peer_host=host, exc_info=error)
        finally:
            if not sending:
                connection.close()

    async def _greet(self, connection: socket.socket) -> Hello:
        if self._greeting >= self._limits.max_links:
            metrics.REFUSED.labels(reason="too_many").inc()
            raise PeerError("too many connections of peers")
        self._greeting += 1
        try:
            async with asyncio.timeout(self._limits.dial_seconds):
                return await self._exchange_greetings(connection)
        finally:
            self._greeting -= 1

    async def _exchange_greetings(self, connection: socket.socket) -> Hello:
        send_at_once(connection)
        try:
            hello = await receive(connection)
        except PeerError:
            metrics.REFUSED.labels(reason="malformed").inc()
            raise
        if not isinstance(hello, Hello):
            metrics.REFUSED.labels(reason="malformed").inc()
            raise PeerError(f"a {type(hello).__name__} before a greeting")
        full = (
            len(self._controls) >= self._limits.max_links
            if hello.purpose is Purpose.CONTROL
            else len(self._senders) >= self._limits.max_senders
        )
        if full:
            metrics.REFUSED.labels(reason="too_many").inc()
            await send(connection, Refused(reason="too many connections"))
            raise PeerError("too many connections of peers")
        await send(connection, Hello(purpose=hello.purpose, store=self._exchange.me, port=self.port))
        return hello

    async def _control(self, connection: socket.socket, hello: Hello, host: str) -> None:
        if hello.store == self._exchange.me:
            return
        if hello.port:
            self._seen(hello.store, (host, hello.port))
        control = _Control(connection, hello.store, self._exchange)
        self._controls[control] = None
        silence_seconds = self._limits.silence_seconds / _SIGNS_PER_SILENCE
        try:
            async with background() as tasks:
                tasks.start(control.tell(silence_seconds), name="peer-tell")
                await control.listen()
        finally:
            del self._controls[control]
            control.close()

    def _start_sender(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        sender = Sender(connection, self._exchange, self._limits)
        context = contextvars.copy_context()
        thread = threading.Thread(
            target=lambda: context.run(self._send, sender, connection), name="peer-send", daemon=True
        )
        self._senders[connection] = thread
        thread.start()

    def _send(self, sender: Sender, connection: socket.socket) -> None:
        try:
            sender.run()
        finally:
            self._senders.pop(connection, None)

    def _changed(self, file_id: FileId) -> None:
        """Called from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._mark, file_id)

    def _mark(self, file_id: FileId) -> None:
        for control in self._controls:
            control.mark(file_id)


class _Control:
    """One peer that wants to be told."""

    def __init__(self, connection: socket.socket, peer: StoreId, exchange: Exchange) -> None:
        self._connection = connection
        self._peer = peer
        self._exchange = exchange
        self._files: set[FileId] = set()
        self._marked: dict[FileId, None] = {}
        self._some = asyncio.Event()

    def mark(self, file_id: FileId) -> None:
        """Have the peer told of a file, if it asked."""
        if file_id in self._files:
            self._marked[file_id] = None
            self._some.set()

    async def listen(self) -> None:
        """Take in what the peer asks; ends by raising when it hangs up."""
        while True:
            self._take(await receive(self._connection))

    def _take(self, message: Message) -> None:
        match message:
            case Interest(file=identity, loading=loading):
                file_id = identity.file_id
                self._drop(file_id)
                if len(self._files) >= MAX_FILES_PER_PEER:
                    raise PeerError(f"it asks for more than {MAX_FILES_PER_PEER} files")
                if self._exchange.subscribe(self._peer, identity, loading=loading) is None:
                    raise PeerError("too many files are shared; it is let go")
                self._files.add(file_id)
                self.mark(file_id)
            case Leave(file_id=file_id):
                self._drop(file_id)
            case _:
                raise PeerError(f"a {type(message).__name__} on a control connection")

    def _drop(self, file_id: FileId) -> None:
        if file_id in self._files:
            self._files.discard(file_id)
            self._marked.pop(file_id, None)
            self._exchange.unsubscribe(self._peer, file_id)

    async def tell(self, silence_seconds: float) -> None:
        """Send states as they change, and signs of life."""
        while True:
            message: State | Ping | None = Ping()
            try:
                async with asyncio.timeout(silence_seconds):
                    await self._some.wait()
            except TimeoutError:
                pass
            else:
                file_id = next(iter(self._marked), None)
                if file_id is None:
                    self._some.clear()
                    continue
                del self._marked[file_id]
                message = self._exchange.state(file_id)
            if message is not None:
                async with asyncio.timeout(4 * silence_seconds):
                    await send(self._connection, message)

    def close(self) -> None:
        """Forget what the peer asked."""
        for file_id in list(self._files):
            self._drop(file_id)


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has ended by itself
