"""The attach socket: hands out the pool's memory, and holds a lease as long as each connection lives."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.store import metrics
from services.store.catalog import Catalog
from services.store.loads import Loads
from services.store.messages import (
    attach_reply,
    done_message,
    failed_message,
    files_of,
    ready_messages,
    tier_of,
    urgency_of,
)
from services.store.pool.resident import Phase, Resident
from stoker import log
from stoker.accepting import serve_connections
from stoker.attach import framing
from stoker.clock import Clock
from stoker.errors import ConfigError, PeerError, QueueFull, StokerError
from stoker.tcp import HungUp, receive_exactly
from stoker.v1 import checkpoint_store_pb2 as pb

REQUEST_SECONDS = 5.0
"""A client that connects sends its request within this time, or is let go."""

_BACKLOG = 128
_FIRST_SEND_BYTES = 64 * 1024
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7), SO_PEERCRED


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """An attach that is being served."""

    request: pb.AttachRequest
    files: range
    """Numbers of the checkpoint's files that it is about."""
    began_seconds: float


class AttachServer:
    """Serves attach connections; each is a task."""

    def __init__(
        self, path: Path, *, loads: Loads, catalog: Catalog, clock: Clock, max_attachments: int
    ) -> None:
        """Args: path: of the socket. max_attachments: connections at a time, bounded."""
        self._path = path
        self._loads = loads
        self._catalog = catalog
        self._clock = clock
        self._max_attachments = max_attachments
        self._open = 0
        self._listener: socket.socket | None = None
        self._descriptors: tuple[int, ...] = ()

    def bind(self) -> None:
        """Listen; a socket file that a dead daemon left is replaced (the caller owns the folder).

        Raises:
            ConfigError: The socket cannot be made there.
        """
        listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        try:
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"cannot listen on {self._path}: {error.strerror or error}; set STOKER_STORE_RUN_DIR"
            ) from error
        self._listener = listener
        self._descriptors = (
            self._loads.arena.read_only_descriptor(),
            self._loads.counters.read_only_descriptor(),
        )

    async def serve(self) -> None:
        """Accept connections until cancelled; ends all of them then."""
        if self._listener is None:
            raise StokerError("the attach socket is not bound")
        await serve_connections(self._listener, self._serve_one, name="attach")

    def close(self) -> None:
        """Remove the socket and close what is handed out."""
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None
        self._path.unlink(missing_ok=True)
        for descriptor in self._descriptors:
            os.close(descriptor)

    async def _serve_one(self, connection: socket.socket, _host: str) -> None:
        self._open += 1
        try:
            with connection, log.bind(peer_pid=_peer_pid(connection)):
                await self._attach(connection)
        except (OSError, PeerError, TimeoutError) as error:
            log.get().info(
                "attach.broken", message=str(error)
            )  # the client's fault or end; its lease is gone
        except Exception as error:  # noqa: BLE001 - the boundary of a connection's task
            log.get().error("attach.crashed", exc_info=error)
        finally:
            self._open -= 1

    async def _attach(self, connection: socket.socket) -> None:
        async with asyncio.timeout(REQUEST_SECONDS):
            request = await _message(connection, pb.AttachRequest)
        if request.pool_only:
            await self._show_pool(connection)
            return
        began_seconds = self._clock.now_seconds()
        try:
            if self._open > self._max_attachments:
                raise QueueFull(
                    f"{self._max_attachments} attachments are open; raise STOKER_STORE_MAX_ATTACHMENTS",
                    retry_after_seconds=1.0,
                )
            rank = request.rank if request.HasField("rank") else None
            entry = await self._catalog.open(request.uri, revision=request.revision)
            files = files_of(entry, rank)
            # A window shows one file after the other; ranks are used side by side.
            window = request.window and entry.index.ranks == 1
            resident = self._loads.lease(entry, urgency_of(request.priority), window=window)
        except StokerError as error:
            await _refuse(connection, request, error)
            return
        reader = None if resident.window is None else resident.window.join()
        with log.bind(holder=request.holder, uri=request.uri):
            try:
                asked = _Asked(request=request, files=files, began_seconds=began_seconds)
                await self._serve_lease(connection, asked, resident, reader)
            finally:
                self._loads.end_lease(resident, reader)
                log.get().info("lease.ended", seconds=round(self._clock.now_seconds() - began_seconds, 3))

    async def _show_pool(self, connection: socket.socket) -> None:
        """Hand the pool's memory out, to be page-locked before there is a checkpoint in it."""
        arena = self._loads.arena
        shown = pb.Attached(arena_bytes=arena.total_bytes, chunk_bytes=arena.chunk_bytes)
        reply = framing.frame(pb.AttachReply(attached=shown))
        sent = socket.send_fds(connection, [reply], self._descriptors)
        await _send(connection, reply[sent:])
        await _until_closed(connection)

    async def _serve_lease(
        self, connection: socket.socket, asked: _Asked, resident: Resident, reader: int | None
    ) -> None:
        """Answer and report progress, until the client leaves or the load fails."""
        async with asyncio.TaskGroup() as group:
            listens = (
                _until_closed(connection)
                if reader is None
                else self._until_read(connection, resident, reader)
            )
            left = group.create_task(listens)
            answered = group.create_task(self._answer(connection, asked, resident))
            left.add_done_callback(lambda _: answered.cancel())
            answered.add_done_callback(lambda task: None if _holds_on(task) else left.cancel())

    async def _until_read(self, connection: socket.socket, resident: Resident, reader: int) -> None:
        """Take note of what a window's reader has used up, until it has left."""
        with suppress(ConnectionResetError, HungUp):
            while True:
                said = await _message(connection, pb.AttachConsumed)
                self._loads.consumed(resident, reader, file=said.file, upto_bytes=said.bytes)

    async def _answer(self, connection: socket.socket, asked: _Asked, resident: Resident) -> bool:
        """Send the chunk map and then progress; True when the checkpoint is there and the lease goes on."""
        warm = resident.phase is Phase.READY and resident.window is None
        tier = tier_of(resident)
        try:
            await asyncio.shield(resident.mapped)
        except StokerError as error:
            await _refuse(connection, asked.request, error)
            return False
        seconds = self._clock.now_seconds() - asked.began_seconds
        metrics.ATTACH_SECONDS.observe(seconds)
        reply = framing.frame_bytes(
            attach_reply(self._loads, resident, asked.files, tier=tier, columns=asked.request.columns)
        )
        sent = socket.send_fds(connection, [reply[:_FIRST_SEND_BYTES]], self._descriptors)
        await _send(connection, reply[sent:])
        log.get().info("lease.began", tier=tier, seconds=round(seconds, 4))
        return await self._report(connection, resident, asked.files, warm_seconds=seconds if warm else None)

    async def _report(
        self, connection: socket.socket, resident: Resident, files: range, *, warm_seconds: float | None
    ) -> bool:
        told = [0] * len(files)
        with resident.changes.watched() as further:
            while True:
                further.clear()
                if resident.phase is Phase.GONE:
                    reason = resident.error or StokerError(f"{resident.entry.uri} was dropped")
                    await _send(connection, framing.frame(pb.AttachProgress(failed=failed_message(reason))))
                    return False
                if resident.phase is Phase.READY:
                    done = done_message(resident, warm_seconds=warm_seconds)
                    await _send(connection, framing.frame(pb.AttachProgress(done=done)))
                    return True
                await _send(connection, b"".join(map(framing.frame, ready_messages(resident, files, told))))
                await further.wait()


def _holds_on(task: asyncio.Task[bool]) -> bool:
    return not task.cancelled() and task.exception() is None and task.result()


async def _refuse(connection: socket.socket, request: pb.AttachRequest, error: StokerError) -> None:
    log.get().warning(
        "attach.refused",
        uri=request.uri,
        holder=request.holder,
        error_code=error.code,
        message=error.message,
    )
    await _send(connection, framing.frame(pb.AttachReply(failed=failed_message(error))))


async def _message(connection: socket.socket, kind: type[framing.M]) -> framing.M:
    prefix = await receive_exactly(connection, framing.LENGTH_BYTES)
    length = framing.body_length(prefix, limit_bytes=framing.MAX_REQUEST_BYTES)
    return framing.parse(kind, await receive_exactly(connection, length))


async def _send(connection: socket.socket, data: bytes) -> None:
    if data:  # else it would cost a turn of the loop
        await asyncio.get_running_loop().sock_sendall(connection, data)


async def _until_closed(connection: socket.socket) -> None:
    """Return when the client has left; a client says nothing after its request."""
    with suppress(ConnectionResetError):
        while await asyncio.get_running_loop().sock_recv(connection, 4096):
            pass


def _peer_pid(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[0])
