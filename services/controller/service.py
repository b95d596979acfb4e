"""The controller's parts, put together, and their lifecycle."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any

from services.controller.grpc_service import ControllerService
from services.controller.leadership import Leadership
from services.controller.settings import ControllerSettings
from stoker import log
from stoker.clock import SystemClock
from stoker.errors import StokerError
from stoker.rpc import Server
from stoker.state import open_state
from stoker.v1 import controller_pb2_grpc

SERVICE_NAME = "stoker.v1.Controller"


class ControllerProcess:
    """The parts of one controller process; see `stoker.serving.Service`."""

    def __init__(self, settings: ControllerSettings, ended: asyncio.Event) -> None:
        self._settings = settings
        self._ended = ended
        self._open = AsyncExitStack()
        self._server = Server([SERVICE_NAME])
        self._leading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the state, serve, campaign; with the embedded state, return once this controller leads."""
        self._server.bind(self._settings.address)
        clock = SystemClock()
        store = await self._open.enter_async_context(open_state(self._settings.state, clock=clock))
        leadership = Leadership(store, self._settings, clock)
        service = ControllerService(leadership, self._settings)
        controller_pb2_grpc.add_ControllerServicer_to_server(service, self._server.grpc_server)
        self._leading = asyncio.get_running_loop().create_task(self._lead(leadership), name="leadership")
        if self._settings.state.startswith("embedded:"):
            await _either(leadership.leading.wait(), self._leading)
        await self._server.start()

    async def stop_serving(self) -> None:
        """Answer not-serving to health checks."""
        await self._server.set_serving(serving=False)

    async def drain(self, grace_seconds: float) -> None:
        """Return at once: requests that wait here are asked again by their gateways."""
        del grace_seconds

    async def close(self) -> None:
        """Resign, end all streams, close the state."""
        if self._leading is not None:
            self._leading.cancel()
            with suppress(asyncio.CancelledError, StokerError):
                await self._leading
        await self._server.stop()
        await self._open.aclose()

    async def _lead(self, leadership: Leadership) -> None:
        try:
            await leadership.run()
        except Exception as error:
            log.get().error("controller.failed", exc_info=error)
            self._ended.set()
            raise


async def _either(wait: Coroutine[Any, Any, object], task: asyncio.Task[None]) -> None:
    """Return when `wait` is over; raise what `task` raised when it ended first."""
    waiting = asyncio.ensure_future(wait)
    try:
        await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        waiting.cancel()
