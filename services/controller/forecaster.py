"""Acts on forecasts for one term: looks now and then, has stores prefetch, says how many workers are wanted.

What to do is decided by `foresight`; nothing here decides. A prefetch is an order to a store that may take
minutes; it gives way to loads that somebody waits for and drops nothing but what the decision names. Its end,
good or bad, changes nothing but what the next look knows.
"""

from __future__ import annotations

from typing import Protocol

from services.controller import metrics
from services.controller.cluster_view.view import View
from services.controller.records import ModelRecord
from services.controller.scaling.foresight import (
    SETTLE_SECONDS,
    Foreseen,
    Limits,
    Prefetch,
    attend,
    foresee,
    has_ended,
)
from stoker.background import Background, background
from stoker.clock import Clock
from stoker.errors import PeerError, StokerError
from stoker.ids import ModelName, NodeId


class Cluster(Protocol):
    """What is looked at, and told."""

    view: View
    records: dict[ModelName, ModelRecord]

    def tell(self, kind: str, **fields: object) -> None:
        """Log an event, and keep it for operators."""
        ...


class Stores(Protocol):
    """Calls to stores; see `Orders`."""

    async def prefetch(self, store_address: str, model: ModelRecord) -> int:
        """Bring a checkpoint to a store's memory, into free room; returns the bytes that it moved."""
        ...

    async def evict(self, store_address: str, model: ModelRecord) -> None:
        """Drop a checkpoint from a store's memory, unless somebody holds it."""
        ...


class Forecaster:
    """Looks ahead while its controller leads.

    Args:
        cluster: What is known, and who is told.
        stores: Takes the orders.
        limits: What forecasts may do.
        look_seconds: From one look to the next.
        clock: The view's.
    """

    def __init__(
        self, cluster: Cluster, stores: Stores, limits: Limits, *, look_seconds: float, clock: Clock
    ) -> None:
        self._cluster = cluster
        self._stores = stores
        self._limits = limits
        self._look_seconds = look_seconds
        self._clock = clock
        self._foreseen = Foreseen()

    async def run(self) -> None:
        """Look ahead until cancelled; prefetches under way go on in their stores."""
        async with background() as tasks:
            while True:
                self.look(tasks)
                await self._attend(tasks, until_seconds=self._clock.now_seconds() + self._look_seconds)

    async def _attend(self, tasks: Background, *, until_seconds: float) -> None:
        """Until the next look see now and then to models that wait for room."""
        while (left_seconds := until_seconds - self._clock.now_seconds()) > 0:
            await self._clock.sleep(min(left_seconds, SETTLE_SECONDS))
            self.attend(tasks)

    def attend(self, tasks: Background) -> None:
        """Have read what models that wait for room need, if any does."""
        view = self._cluster.view
        if view.refusals:
            self._foreseen = attend(view, self._foreseen, self._clock.now_seconds(), self._limits)
            self._begin(tasks)

    def look(self, tasks: Background) -> None:
        """Decide once, and begin what was decided."""
        before = self._foreseen.pools
        self._foreseen = foresee(self._cluster.view, self._foreseen, self._clock.now_seconds(), self._limits)
        for node_id, pool in self._foreseen.pools.items():
            if node_id not in before or before[node_id].count != pool.count:
                self._cluster.tell("workers.wanted", node_id=node_id, count=pool.count)
        self._begin(tasks)

    def _begin(self, tasks: Background) -> None:
        for prefetch in self._foreseen.prefetches:
            tasks.start(self._prefetch(prefetch, tasks), name=f"prefetch-{prefetch.model}")

    def warm_workers(self, node_id: NodeId) -> int | None:
        """Return how many pre-started workers are wanted on a node; None = as it is configured."""
        pool = self._foreseen.pools.get(node_id)
        return pool.count if pool is not None else None

    async def _prefetch(self, prefetch: Prefetch, tasks: Background) -> None:
        """Carry a prefetch out; once it has ended well, look for the next one soon."""
        failed = True
        try:
            failed = not await self._ended_well(prefetch)
        finally:
            now_seconds = self._clock.now_seconds()
            self._foreseen = has_ended(self._foreseen, prefetch.node_id, now_seconds, failed=failed)
        if not failed:
            await self._clock.sleep(SETTLE_SECONDS)
            self.look(tasks)

    async def _ended_well(self, prefetch: Prefetch) -> bool:
        began_seconds = self._clock.now_seconds()
        what = {"model": prefetch.model, "node_id": prefetch.node_id}
        try:
            moved_bytes = await self._carry_out(prefetch)
        except StokerError as error:
            metrics.PREFETCHES.labels(outcome="failed").inc()
            self._cluster.tell("prefetch.failed", **what, error_code=error.code, message=error.message)
            return False
        metrics.PREFETCHES.labels(outcome="done").inc()
        metrics.PREFETCHED_BYTES.inc(moved_bytes)
        seconds = self._clock.now_seconds() - began_seconds
        self._cluster.tell("prefetch.ended", **what, bytes=moved_bytes, seconds=round(seconds, 3))
        return True

    async def _carry_out(self, prefetch: Prefetch) -> int:
        node, records = self._cluster.view.nodes.get(prefetch.node_id), self._cluster.records
        wanted = records.get(prefetch.model)
        if node is None or wanted is None:
            raise PeerError(f"model {prefetch.model} or node {prefetch.node_id} is gone")
        self._cluster.tell(
            "prefetch.ordered",
            model=prefetch.model,
            node_id=prefetch.node_id,
            dropped=", ".join(prefetch.drop),
            likelihood=round(prefetch.likelihood, 3),
            gain_seconds=round(prefetch.gain_seconds, 3),
        )
        for name in prefetch.drop:
            if name in records:
                await self._stores.evict(node.store_address, records[name])
        return await self._stores.prefetch(node.store_address, wanted)
