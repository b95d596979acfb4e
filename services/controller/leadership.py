"""From candidate to leader and back: campaign, build the cluster anew, run it, resign."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass

from services.controller import metrics
from services.controller.cluster import Cluster
from services.controller.forecaster import Forecaster
from services.controller.ledger import Ledger
from services.controller.orders import Orders
from services.controller.rebalancer import Rebalancer
from services.controller.records import LEADER_KEY
from services.controller.registry import Registry
from services.controller.settings import ControllerSettings
from stoker import log
from stoker.background import background
from stoker.clock import Clock
from stoker.errors import Fenced, NotLeader, PeerError
from stoker.state import Delete, FencedState, StateStore, campaign, observe

RETRY_SECONDS = 0.5
"""Between a lost term and the next campaign: the state may need a moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """What the leader has while it leads."""

    cluster: Cluster
    registry: Registry
    forecaster: Forecaster
    fence: int


class Leadership:
    """Who leads; `term()` gives the parts of this controller's own term."""

    def __init__(self, store: StateStore, settings: ControllerSettings, clock: Clock) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._term: Term | None = None
        self.leader_address = ""
        self.leading = asyncio.Event()

    def term(self) -> Term:
        """Return the running term.

        Raises:
            NotLeader: Another controller leads, or none does; `details["leader"]` is its address, if known.
        """
        if self._term is None:
            own_address = self._settings.public_address
            # its own while a term begins, and for a moment after one was lost: it would be asked at once
            leader_address = "" if self.leader_address == own_address else self.leader_address
            other = f"ask {leader_address}" if leader_address else "none leads now, ask again"
            raise NotLeader(
                f"controller {own_address} does not lead: {other}",
                retry_after_seconds=1.0,
                details={"leader": leader_address},
            )
        return self._term

    async def run(self) -> None:
        """Campaign and lead, again and again, until cancelled.

        Raises:
            ConfigError: The state holds what this controller cannot read.
        """
        if self._settings.state.startswith("embedded:"):
            # The file's lock is ours, so whoever led before is dead: don't wait for its lease to run out.
            await self._store.transact([], [Delete(key=LEADER_KEY)])
        async with background() as tasks:
            tasks.start(self._observe(), name="observe-leader")
            while True:
                try:
                    await self._lead()
                except* (Fenced, PeerError) as errors:  # several tasks of one term may fail at once
                    log.get().warning("term.lost", reasons=[str(error) for error in errors.exceptions])
                await self._clock.sleep(RETRY_SECONDS)

    async def _lead(self) -> None:
        async with campaign(
            self._store,
            LEADER_KEY,
            identity=self._settings.public_address.encode(),
            ttl_seconds=self._settings.leader_ttl_seconds,
        ) as fenced:
            await self._serve_term(fenced)

    async def _serve_term(self, fenced: FencedState) -> None:
        ledger = Ledger(fenced)
        orders = Orders(self._settings, ledger.fence)
        cluster = Cluster(ledger, orders, self._settings, self._clock)
        try:
            await cluster.load()
            forecaster = Forecaster(
                cluster,
                orders,
                self._settings.limits(),
                look_seconds=self._settings.forecast_look_seconds,
                clock=self._clock,
            )
            self._term = Term(
                cluster=cluster,
                registry=Registry(cluster, self._settings),
                forecaster=forecaster,
                fence=ledger.fence,
            )
            self.leader_address = self._settings.public_address
            self.leading.set()
            metrics.LEADING.set(1)
            log.get().info("term.began", fence=ledger.fence, models=len(cluster.records))
            async with background() as tasks:
                tasks.start(forecaster.run(), name="forecaster")
                if self._settings.rebalance:
                    tasks.start(self._rebalancer(cluster, orders).run(), name="rebalancer")
                await cluster.run()
        finally:
            self._term = None
            self.leading.clear()
            metrics.LEADING.set(0)
            cluster.end()
            await orders.close()

    def _rebalancer(self, cluster: Cluster, orders: Orders) -> Rebalancer:
        settings = self._settings
        return Rebalancer(
            cluster,
            orders,
            settings.rebalance_limits(),
            look_seconds=settings.rebalance_look_seconds,
            begin_seconds=settings.node_timeout_seconds,
            clock=self._clock,
        )

    async def _observe(self) -> None:
        async with aclosing(observe(self._store, LEADER_KEY)) as leaders:
            async for leader in leaders:
                self.leader_address = leader.identity.decode() if leader else ""
