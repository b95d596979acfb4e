"""The process that has a worker's imports done, as the agent sees it: started, asked, started again.

Importing torch and transformers costs a worker seconds of processor time; a fork of a process that has done
it costs milliseconds, and shares the imported pages. What is said between the two stands in
`services/worker/fork_server.py`.

Rules:
1. The first worker starts the server, and waits for it: its imports are what the worker would do anyway.
2. While a lost server starts again, and wherever none can be had, `fork` raises `NoForkServer` at once: the
   agent starts that worker directly, which is slower and shows why the imports fail, if they do.
3. Its imports give way to everybody, unless an order waits for a worker (`hurry`).
4. A server that keeps ending is started again more and more rarely, and only when a worker is wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from services.node_agent.workers.forked_child import ForkedChild, adopt_orphans, describe_exit
from services.node_agent.workers.priority import give_way_no_more
from stoker import log
from stoker.units import KIB

PACKET_BYTES = 16 * KIB
"""Longest packet between the two."""

FORK_SECONDS = 60.0
"""A server that has not forked a worker after this is ended; it takes 20 ms where nothing else runs."""

PATIENCE_SECONDS = 10.0
"""Niced imports that an order waits for may go on for this long: on an idle host they end sooner
than they would when begun anew."""

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 300.0

LAST_OUTPUT_SECONDS = 0.2
"""After the server's end its pipe is read for this long at most."""

_KEPT_OUTPUT_BYTES = 4 * KIB


class NoForkServer(Exception):
    """There is no fork server now: start the worker directly."""


def pause_seconds(failed_starts: int) -> float:
    """Return how long no server is started after this many in a row that ended before they were ready."""
    if failed_starts == 0:
        return 0.0
    return min(FIRST_PAUSE_SECONDS * 2.0 ** min(failed_starts - 1, 32), LONGEST_PAUSE_SECONDS)


class ForkServer:
    """Forks workers; belongs to the event loop.

    Args:
        environment: Of the server, and so of every worker it forks.
        spawn: Runs a coroutine as a task that ends with the agent, e.g. `Background.spawn`.
        enabled: False: `fork` always raises.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
        *,
        enabled: bool = True,
    ) -> None:
        self._environment = environment
        self._spawn = spawn
        self._enabled = enabled
        self._ready: asyncio.Future[_Server] | None = None
        self._was_lost = False
        self._failed_starts = 0
        self._not_before_seconds = 0.0
        self._turn = asyncio.Lock()
        self._importing: _Server | None = None
        self._is_awaited = False
        self._begins_anew = False
        self._patience: asyncio.TimerHandle | None = None

    async def fork(self, arguments: Sequence[str], *, niceness: int) -> ForkedChild:
        """Return a new worker, as soon as the server is ready.

        Args:
            arguments: Of the worker.
            niceness: Of the server's imports, if this call is what starts it.

        Raises:
            NoForkServer: Start the worker directly.
            OSError: The kernel makes no more processes.
        """
        if self._ready is None:
            self._ready = self._start(niceness)
        elif not niceness:
            self.hurry()
        if self._was_lost and not self._ready.done():
            raise NoForkServer
        server = await asyncio.shield(self._ready)
        async with self._turn:
            return await server.fork(arguments)

    def hurry(self) -> None:
        """Have imports that are under way give way to nobody any more: an order waits for them.

        Beside busy replicas they may else take minutes. Asked again and again (`Hurry`): they begin to give
        way only once they have begun. Where taking niceness back is not allowed, imports
        that have not ended `PATIENCE_SECONDS` later begin anew, at once and without niceness.
        """
        if self._ready is not None and not self._ready.done():
            self._is_awaited = True
            self._hurry_imports()

    def _hurry_imports(self) -> None:
        server = self._importing
        if server is None or not self._is_awaited:
            return
        self._is_awaited = False
        if not give_way_no_more(server.pid) and self._patience is None:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(PATIENCE_SECONDS, self._begin_anew, server)

    def _begin_anew(self, server: _Server) -> None:
        if self._importing is server:
            log.get().info("fork_server.begun_anew", pid=server.pid, reason="an order waits for its imports")
            self._begins_anew = True
            server.kill()  # its channel stays: somebody waits for its greeting

    def _start(self, niceness: int) -> asyncio.Future[_Server]:
        if self._enabled and not adopt_orphans():
            log.get().warning("fork_server.impossible", reason="no child subreaper or no pidfd here")
            self._enabled = False
        if not self._enabled or time.monotonic() < self._not_before_seconds:
            raise NoForkServer
        ready = asyncio.get_running_loop().create_future()
        self._is_awaited = False
        self._spawn(self._live(ready, niceness), "fork server")
        return ready

    async def _live(self, ready: asyncio.Future[_Server], niceness: int) -> None:
        """Start a server, follow it to its end, and make sure that nobody waits for it any more."""
        began_seconds = time.monotonic()
        output = bytearray()
        try:
            reason = await self._follow(ready, niceness, output, began_seconds)
            if self._begins_anew:
                reason = await self._follow(ready, 0, output, began_seconds)
        except OSError as error:
            reason = f"could not be started: {error.strerror or error}"
        finally:
            self._ready, was_ready = None, ready.done()
            if not was_ready:
                ready.set_exception(NoForkServer())
                ready.exception()  # looked at, also when nobody waits
        self._was_lost = True
        self._failed_starts = 0 if was_ready else self._failed_starts + 1
        self._not_before_seconds = time.monotonic() + pause_seconds(self._failed_starts)
        printed = output.decode(errors="replace")
        log.get().warning("fork_server.lost", reason=reason, was_ready=was_ready, output=printed)

    async def _follow(
        self, ready: asyncio.Future[_Server], niceness: int, output: bytearray, began_seconds: float
    ) -> str:
        """Start a server and return how it ended; raises OSError where there can be no process."""
        server = await _Server.start(self._environment, niceness)
        self._begins_anew = False
        if niceness:
            self._importing = server
            self._hurry_imports()
        try:
            async with asyncio.TaskGroup() as tasks:
                greeting = tasks.create_task(self._greet(server, ready, began_seconds))
                reason = await server.ended(output)
                greeting.cancel()
        finally:
            self._importing = None
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None
            server.close()
        return reason

    async def _greet(self, server: _Server, ready: asyncio.Future[_Server], began_seconds: float) -> None:
        if not await server.greeting() or self._begins_anew:
            return  # it ends, and its output says why; or it ends because it came too late
        self._importing = None
        ready.set_result(server)
        seconds = round(time.monotonic() - began_seconds, 3)
        log.get().info("fork_server.ready", pid=server.pid, seconds=seconds)


class _Server:
    """A running server process and this end of the pair."""

    def __init__(self, process: asyncio.subprocess.Process, channel: socket.socket) -> None:
        self._process = process
        self._channel = channel
        self.pid = process.pid

    @classmethod
    async def start(cls, environment: Mapping[str, str], niceness: int) -> _Server:
        """Start a server; raises OSError where there can be no process."""
        channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel.setblocking(False)
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", "services.worker.fork_server"),
                    *("--channel", str(theirs.fileno())),
                    *("--parent-pid", str(os.getpid())),
                    *("--niceness", str(niceness)),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                    env=environment,
                )
            except BaseException:
                channel.close()
                raise
        return cls(process, channel)

    async def greeting(self) -> bool:
        """Return True when the imports are done, False when the server has ended instead."""
        return bool(await self._receive())

    async def fork(self, arguments: Sequence[str]) -> ForkedChild:
        """See `ForkServer.fork`; one call at a time."""
        output_read, output_write = os.pipe()
        go_read, go_write = os.pipe()
        try:
            pid = await self._ask(arguments, output_write, go_read)
            child = await ForkedChild.adopt(pid, os.dup(output_read))
            with contextlib.suppress(BrokenPipeError):  # it has ended: whoever follows the child will see
                os.write(go_write, b"\n")
        finally:
            for descriptor in (output_read, output_write, go_read, go_write):
                os.close(descriptor)
        return child

    async def _ask(self, arguments: Sequence[str], *descriptors: int) -> int:
        try:
            async with asyncio.timeout(FORK_SECONDS):
                socket.send_fds(self._channel, [json.dumps(arguments).encode()], descriptors)
                packet = await self._receive()
        except (TimeoutError, OSError) as error:
            self.kill()
            raise NoForkServer from error
        except asyncio.CancelledError:
            self.kill()  # its answer would be taken for that to the next request
            raise
        if not packet:
            raise NoForkServer
        answer = json.loads(packet)
        if "pid" not in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        return int(answer["pid"])

    async def _receive(self) -> bytes:
        """Return the next packet; empty when the other end is closed."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return self._channel.recv(PACKET_BYTES)
            except BlockingIOError:
                pass
            except ConnectionError:
                return b""
            readable = asyncio.Event()
            loop.add_reader(self._channel, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(self._channel)

    async def ended(self, output: bytearray) -> str:
        """Return how the process ended, once it has; `output` gets the end of what it printed."""
        async with asyncio.TaskGroup() as tasks:
            copying = tasks.create_task(self._copy_output(output))
            code = await self._process.wait()
            await asyncio.wait([copying], timeout=LAST_OUTPUT_SECONDS)
            copying.cancel()
        return describe_exit(code)

    async def _copy_output(self, output: bytearray) -> None:
        if self._process.stdout is None:
            raise AssertionError("its output is a pipe")
        while piece := await self._process.stdout.read(_KEPT_OUTPUT_BYTES):
            output += piece
            del output[:-_KEPT_OUTPUT_BYTES]

    def kill(self) -> None:
        """End the process; who waits for its greeting, or for its end, is told."""
        if self._process.returncode is None:
            self._process.kill()

    def close(self) -> None:
        """End the process; it holds nothing."""
        self.kill()
        self._channel.close()
