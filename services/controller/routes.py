"""Routes for gateways: kept current, told to each watcher as whole first and then as changes.

A watcher that reads slowly misses nothing and costs no memory: it is told which models changed, and reads
their routes as they are when it gets there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import suppress

from services.controller.cluster_view.view import View
from services.controller.records import ModelRecord
from services.controller.wire import route_message
from stoker.ids import ModelName
from stoker.v1 import controller_pb2, model_pb2

ROUTES_IN_MESSAGE = 100
"""A route is at most some 20 KiB (names and addresses are bounded), usually less than one."""


class Routes:
    """All routes, and who watches them; belongs to one event loop."""

    def __init__(self, heartbeat_seconds: float) -> None:
        self._heartbeat_seconds = heartbeat_seconds
        self._routes: dict[ModelName, controller_pb2.Route] = {}
        self._watchers: set[_Watcher] = set()

    def refresh(
        self,
        view: View,
        records: dict[ModelName, ModelRecord],
        names: Iterable[ModelName],
        now_seconds: float,
    ) -> None:
        """Recompute the routes of `names` and wake the watchers of those that changed."""
        changed = {name for name in names if self._refresh(view, records.get(name), name, now_seconds)}
        for watcher in self._watchers if changed else ():
            watcher.names |= changed
            watcher.woken.set()

    async def watch(self) -> AsyncGenerator[controller_pb2.RoutesUpdate, None]:
        """Iterate over updates: a snapshot, then changes, and a heartbeat where nothing changes."""
        watcher = _Watcher()
        self._watchers.add(watcher)
        try:
            for page in _pages([self._routes[name] for name in sorted(self._routes)]):
                yield page
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._heartbeat_seconds):
                        await watcher.woken.wait()
                names, watcher.names = watcher.names, set()
                watcher.woken.clear()
                ordered = sorted(names)
                for begin in range(0, max(1, len(ordered)), ROUTES_IN_MESSAGE):
                    some = ordered[begin : begin + ROUTES_IN_MESSAGE]
                    changes = [self._routes.get(name) or _deleted(name) for name in some]
                    yield controller_pb2.RoutesUpdate(routes=changes, heartbeat=not changes)
        finally:
            self._watchers.discard(watcher)

    def _refresh(self, view: View, record: ModelRecord | None, name: ModelName, now_seconds: float) -> bool:
        if record is None:
            return self._routes.pop(name, None) is not None
        route = route_message(view, record, now_seconds)
        changed = self._routes.get(name) != route
        self._routes[name] = route
        return changed


class _Watcher:
    """One stream: which models it has yet to be told about (at most all there are)."""

    def __init__(self) -> None:
        self.names: set[ModelName] = set()
        self.woken = asyncio.Event()


def _pages(routes: list[controller_pb2.Route]) -> Iterator[controller_pb2.RoutesUpdate]:
    """Yield a snapshot in messages far below gRPC's limit of 4 MiB; at least one."""
    begins = range(0, max(1, len(routes)), ROUTES_IN_MESSAGE)
    for begin in begins:
        yield controller_pb2.RoutesUpdate(
            snapshot=begin == 0,
            routes=routes[begin : begin + ROUTES_IN_MESSAGE],
            more=begin != begins[-1],
        )


def _deleted(name: ModelName) -> controller_pb2.Route:
    spec = model_pb2.ModelSpec(name=name)
    return controller_pb2.Route(model=model_pb2.Model(spec=spec), deleted=True)
