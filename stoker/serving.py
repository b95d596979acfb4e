"""One lifecycle for every process: start → serve → signal → not serving → drain → close.

A service builds its parts in `start`, so that a failure there leaves through the same door as a signal:
`close` runs in any case, once.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn, Protocol, TypeVar

import uvloop

from stoker import log
from stoker.errors import ConfigError, StokerError
from stoker.metrics import serve_metrics
from stoker.process import die_with_parent
from stoker.settings import ServiceSettings, load_settings

S = TypeVar("S", bound=ServiceSettings)

EXIT_FAILED = 1
EXIT_CONFIG = 2


class Service(Protocol):
    """A process's parts, as its `__main__` builds them."""

    async def start(self) -> None:
        """Open sockets and begin serving; raises StokerError when it can't. Cancelled by a signal."""
        ...

    async def stop_serving(self) -> None:
        """Answer not-serving to health checks from now on; new work is refused."""
        ...

    async def drain(self, grace_seconds: float) -> None:
        """Return when running work has ended, after `grace_seconds` at the latest."""
        ...

    async def close(self) -> None:
        """Give everything back. Called once, also after a failed start."""
        ...


def main(name: str, settings_class: type[S], build: Callable[[S, asyncio.Event], Service]) -> NoReturn:
    """Read a service's settings and `run` it: the whole of a service's entry point.

    Exits with `EXIT_CONFIG` when a setting is wrong; the reason stands on stderr, in one line.
    """
    try:
        settings = load_settings(settings_class)
    except ConfigError as error:
        log.configure(name)
        log.get().error("service.failed", error_code=error.code, message=error.message)
        sys.exit(EXIT_CONFIG)
    run(name, settings, lambda ended_within: build(settings, ended_within))


def run(name: str, settings: ServiceSettings, build: Callable[[asyncio.Event], Service]) -> NoReturn:
    """Run a service until SIGTERM or SIGINT, then exit the process.

    Args:
        name: For logs, e.g. `controller`.
        settings: Log level, metrics port, drain time, parent.
        build: Makes the service, inside the running loop. It is given an event it may set to end the
            process from within (a fatal condition it has logged).
    """
    if settings.parent_pid:
        die_with_parent(settings.parent_pid, signal.SIGTERM)
    try:
        log.configure(name, level=settings.log_level)
        serve_metrics(settings.metrics_port)
        failed = uvloop.run(_lifecycle(name, settings, build))
    except StokerError as error:
        log.get().error("service.failed", error_code=error.code, message=error.message)
        failed = True
    except Exception as error:  # noqa: BLE001 - the task boundary of the process
        log.get().error("service.crashed", exc_info=error)
        failed = True
    sys.stderr.flush()
    os._exit(EXIT_FAILED if failed else 0)  # non-daemon threads of libraries must not hold the exit up


async def _lifecycle(name: str, settings: ServiceSettings, build: Callable[[asyncio.Event], Service]) -> bool:
    stop, ended_within = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for caught in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(caught, stop.set)
    began_seconds = time.monotonic()
    service = build(ended_within)
    try:
        if not await _started(service, stop):
            log.get().info("service.start_cancelled", name=name)
            return False
        gc.freeze()  # a full collection of what a gateway holds by now stops all its streams for 0.1 s
        log.get().info("service.started", seconds=round(time.monotonic() - began_seconds, 3), pid=os.getpid())
        await _first(stop, ended_within)
        await service.stop_serving()
        await service.drain(settings.drain_seconds)
    finally:
        await service.close()
        log.get().info("service.stopped", name=name)
    return ended_within.is_set()


async def _started(service: Service, stop: asyncio.Event) -> bool:
    """Start the service in this task; return False when a signal came before it was done."""

    async def cut_short() -> None:
        await stop.wait()
        scope.reschedule(asyncio.get_running_loop().time())

    scope = asyncio.timeout(None)
    cutting = asyncio.ensure_future(cut_short())
    try:
        async with scope:
            await service.start()
    except TimeoutError:
        if scope.expired():
            return False
        raise
    finally:
        cutting.cancel()
    return True


async def _first(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
