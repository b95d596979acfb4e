"""The truth of this host, told to the leading controller: a report on every change and as a heartbeat."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence

import grpc

from services.node_agent import metrics
from services.node_agent.devices import read_memory
from services.node_agent.host import Host
from services.node_agent.host_state import FenceSeen, PoolWanted
from services.node_agent.leader_search import LeaderSearch
from services.node_agent.reports import Identity, Observed, build_report
from services.node_agent.store_watch import StoreWatch
from stoker import log
from stoker.errors import NotLeader, PeerError, StokerError
from stoker.rpc import connect, translated
from stoker.v1.controller_pb2 import ReportAck
from stoker.v1.controller_pb2_grpc import ControllerStub
from stoker.v1.node_agent_pb2 import NodeReport

ACK_SECONDS = 5.0
"""A controller that hasn't answered a report by then is given up."""

LAZY_SECONDS = 0.1
"""Changes of session counts and of the store wait this long for company; all others go out at once."""

FIRST_ACK_SECONDS = 3.0
"""The first one: a controller that is paused, or whose host is gone, takes connections or nothing at all."""

LEADER_DETAIL = "leader"
"""Key in the details of `NotLeader` that names the leader's address."""


class Reporter:
    """Builds reports and sends them to the controller that leads.

    Args:
        identity: Of this host.
        heartbeat_seconds: Longest time between two reports.
        controllers: `host:port` of every controller.
        peers_named: Called with the peer addresses of the other hosts' stores when a controller says them.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        heartbeat_seconds: float,
        controllers: Sequence[str],
        peers_named: Callable[[Sequence[str]], None] = lambda _: None,
    ) -> None:
        self._identity = identity
        self._heartbeat_seconds = heartbeat_seconds
        self._controllers = tuple(controllers)
        self._peers_named = peers_named
        self._sequence = 0
        self._changed = asyncio.Event()
        self._lazy: asyncio.TimerHandle | None = None

    def change(self, urgent: bool) -> None:  # noqa: FBT001 - the one thing the callback says
        """Have a report sent: at once, or within `LAZY_SECONDS`."""
        if urgent:
            self._changed.set()
        elif self._lazy is None and not self._changed.is_set():
            self._lazy = asyncio.get_running_loop().call_later(LAZY_SECONDS, self._changed.set)

    def build(self, host: Host, store: StoreWatch) -> NodeReport:
        """Return the report of this moment, with the next sequence number."""
        self._sequence += 1
        loads = host.loads()
        metrics.SESSIONS.labels("running").set(sum(load.running_sessions for load in loads.values()))
        metrics.SESSIONS.labels("waiting").set(sum(load.waiting_sessions for load in loads.values()))
        seen = Observed(
            loads=loads,
            memory=read_memory(),
            store=store.status,
            architectures=host.architectures,
            worker_start_seconds=host.worker_start_seconds,
            next_worker_seconds=host.next_worker_seconds(),
            migrations=host.moves.measured,
            unix_minus_monotonic_seconds=time.time() - time.monotonic(),
        )
        return build_report(self._identity, host.state, seen, self._sequence)

    async def run(self, host: Host, store: StoreWatch) -> None:
        """Report for ever: finds the leader, and finds it again."""
        search = LeaderSearch(self._controllers)
        said: set[str] = set()
        while True:
            address, named = search.address, ""
            before = self._sequence
            try:
                await self._report_to(address, host, store)
            except NotLeader as error:
                named = str(error.details.get(LEADER_DETAIL) or "")
                message = error.message
            except StokerError as error:
                message = error.message
            if self._sequence > before + 1:  # it had answered
                said.clear()
                search.found()
            if message not in said:  # once, not at every try
                log.get().warning("controller.lost", address=address, message=message)
                said.add(message)
            await asyncio.sleep(search.failed(named) * random.uniform(0.5, 1.0))  # noqa: S311 - agents apart

    async def _report_to(self, address: str, host: Host, store: StoreWatch) -> None:
        """Report to one controller until it fails; always raises."""
        async with connect(address) as channel:
            stub = ControllerStub(channel)
            with translated(f"controller {address}"):
                call = stub.ReportNode()
                is_new = True
                while True:
                    self._changed.clear()
                    self._lazy = None
                    ack = await self._send(
                        call,
                        self.build(host, store),
                        address,
                        seconds=FIRST_ACK_SECONDS if is_new else ACK_SECONDS,
                    )
                    if is_new:
                        log.get().info("controller.joined", address=address, fence=ack.fence)
                        is_new = False
                    if ack.HasField("store_peers"):
                        self._peers_named(ack.store_peers.addresses)
                    wanted = ack.warm_workers if ack.HasField("warm_workers") else None
                    if wanted != host.state.pool_wanted:
                        host.apply(PoolWanted(count=wanted))
                    if ack.fence > host.state.highest_fence:
                        host.apply(FenceSeen(fence=ack.fence))
                    # not wait_for: before Python 3.12 it loses a cancellation that comes with the change
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._heartbeat_seconds):
                            await self._changed.wait()

    async def _send(
        self,
        call: grpc.aio.StreamStreamCall[NodeReport, ReportAck],
        report: NodeReport,
        address: str,
        *,
        seconds: float,
    ) -> ReportAck:
        try:
            async with asyncio.timeout(seconds):
                with contextlib.suppress(asyncio.InvalidStateError):  # it ended: reading says why
                    await call.write(report)
                ack = await call.read()
        except TimeoutError:
            call.cancel()
            raise PeerError(f"controller {address} did not answer a report in {seconds:g} s") from None
        if isinstance(ack, ReportAck):
            return ack
        raise PeerError(f"controller {address} ended the stream of reports")


def address_for_others(advertised: str, listening: str, port: int) -> str:
    """Return where others reach this agent: as advertised, else where it listens, with the real port."""
    return advertised or f"{listening.rpartition(':')[0]}:{port}"
