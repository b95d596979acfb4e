"""The route watch: keeps the route table fresh from a controller's stream. A shell."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from services.gateway.routing.controllers import Controllers
from services.gateway.routing.routes import ModelRoute, RouteTable
from stoker import log
from stoker.clock import Clock
from stoker.errors import StokerError
from stoker.v1 import controller_pb2

FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 2.0

UNKNOWN_NAME_PATIENCE_SECONDS = 0.1
"""How long an unknown name waits for the next routes: a model may have been deployed this very moment."""


class RouteWatch:
    """Follows the controllers' routes.

    Args:
        controllers: Who tells them.
        gateway_id: This gateway's name, for the controllers' logs.
        clock: For back-off.
        on_route: Called with each route that is new or changed.

    Attributes:
        table: The routes as last told.
    """

    def __init__(
        self,
        controllers: Controllers,
        *,
        gateway_id: str,
        clock: Clock,
        on_route: Callable[[ModelRoute], None],
    ) -> None:
        self.table = RouteTable()
        self._controllers = controllers
        self._request = controller_pb2.WatchRoutesRequest(gateway_id=gateway_id)
        self._clock = clock
        self._on_route = on_route
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Follow the routes until cancelled, through any number of lost connections."""
        backoff_seconds = FIRST_BACKOFF_SECONDS
        while True:
            try:
                async with aclosing(
                    self._controllers.stream(lambda stub: stub.WatchRoutes(self._request))
                ) as updates:
                    async for update in updates:
                        backoff_seconds = FIRST_BACKOFF_SECONDS
                        self._take(update)
                reason = "the controller ended the stream"
            except StokerError as error:
                reason = error.message
            log.get().warning("routes.lost", reason=reason, retry_seconds=backoff_seconds)
            await self._clock.sleep(backoff_seconds)
            backoff_seconds = min(backoff_seconds * 2, MAX_BACKOFF_SECONDS)

    async def find(self, model: str) -> ModelRoute:
        """Return a model's route, giving an unknown name a moment to appear.

        Raises:
            ModelNotFound: No such model is deployed.
            PeerError: No controller has been heard yet.
        """
        if self.table.synced and model not in self.table:
            await self.wait_for(model, UNKNOWN_NAME_PATIENCE_SECONDS)
        return self.table.find(model)

    async def wait_for(self, model: str, seconds: float) -> None:
        """Return when the model has a route, after `seconds` at the latest."""
        try:
            async with asyncio.timeout(seconds):
                while model not in self.table:
                    await self._changed.wait()
        except TimeoutError:
            return

    def _take(self, update: controller_pb2.RoutesUpdate) -> None:
        if update.heartbeat:
            return
        if update.snapshot:
            log.get().info("routes.synced", models=len(update.routes))
        self.table.apply(update)
        for message in update.routes:
            if not message.deleted:
                self._on_route(self.table.find(message.model.spec.name))
        self._changed.set()  # wakes who waits now; the next ones wait for the next change
        self._changed.clear()
