"""The cluster that chaos works on: real processes, two gateways, and a cuttable link before every node agent.

The processes are those of `stoker up`, with its own supervisor, which restarts whatever ends. Leases are
shorter than the defaults, so that a fault of seconds outlives them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from stoker.cli.free_ports import free_ports
from stoker.cli.local_nodes import (
    LocalNode,
    NodeShape,
    agent_settings,
    layout,
    ports_needed,
    service_command,
    store_settings,
)
from stoker.cli.supervisor import ServiceCommand, Supervisor, serving
from stoker.client import AsyncClient
from stoker.errors import ConfigError, StokerError
from tests.chaos.link import Link

NODE_TIMEOUT_SECONDS = 3.0
NODE_FORGET_SECONDS = 7.0
"""A node that is silent for longer has lost its lease: its reservations are released."""
ORPHAN_GRACE_SECONDS = 2.0
DRAIN_SECONDS = 20.0
POOL_BYTES = 64 * 2**20
GATEWAYS = ("gateway-a", "gateway-b")
UNTIL_SECONDS = 240.0
"""How long a condition may take to hold, unless its waiter says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """One of the gateways."""

    name: str
    rest_url: str
    grpc_address: str


class ChaosCluster:
    """What runs, and how to reach and to hurt it. Made by `chaos_cluster`."""

    def __init__(  # noqa: PLR0913 - all there is
        self,
        *,
        supervisor: Supervisor,
        health: Mapping[str, str],
        nodes: tuple[LocalNode, ...],
        links: dict[str, Link],
        gateways: tuple[Gateway, ...],
        controller: str,
        data_dir: Path,
    ) -> None:
        self.nodes = nodes
        self.links = links
        self.gateways = gateways
        self.controller = controller
        self.data_dir = data_dir
        self._supervisor = supervisor
        self._health = health

    @property
    def state_path(self) -> Path:
        """Return where the controller keeps its state."""
        return self.data_dir / "state" / "state.db"

    def links_of(self, node: str) -> tuple[Link, ...]:
        """Return the links of a node's agent: its gRPC, the sessions beside it, its way to the controller."""
        return self.links[node], self.links[f"{node} sessions"], self.links[f"{node} up"]

    def client(self) -> AsyncClient:
        """Return a client for administration."""
        return AsyncClient(gateway=self.gateways[0].grpc_address, controller=self.controller)

    def process(self, title: str) -> psutil.Process | None:
        """Return a service's process as of now, e.g. of `node_agent of node-1`; None between two lives."""
        try:
            found = psutil.Process(self._supervisor.pids()[title])
        except psutil.NoSuchProcess:
            return None
        return None if found.status() == psutil.STATUS_ZOMBIE else found

    def titles(self) -> list[str]:
        """Return the services' names."""
        return sorted(self._supervisor.pids())

    def everything(self) -> list[psutil.Process]:
        """Return all processes of the cluster, workers included, as of now."""
        return psutil.Process().children(recursive=True)

    async def until_serving(
        self, title: str, not_pid: int = 0, *, limit_seconds: float = UNTIL_SECONDS
    ) -> None:
        """Return when a service answers health checks, in a process other than `not_pid`."""

        def is_new() -> bool:
            found = self.process(title)
            return found is not None and found.pid != not_pid

        await until(is_new, f"{title} has been started again", limit_seconds)
        try:
            async with asyncio.timeout(limit_seconds):
                await serving(self._health[title])
        except TimeoutError:
            raise TimeoutError(
                f"{title} was started again, and does not serve after {limit_seconds:g} s"
            ) from None

    async def until_open(self, *, limit_seconds: float = UNTIL_SECONDS) -> None:
        """Return when the controller reaches every node, and all of them take replicas."""
        async with self.client() as client:

            async def is_open() -> bool:
                try:
                    return sum(node.reachable for node in await client.nodes()) == len(self.nodes)
                except StokerError:
                    return False

            await until(is_open, "every node is reachable", limit_seconds)


@asynccontextmanager
async def chaos_cluster(data_dir: Path, *, node_count: int, devices: int) -> AsyncIterator[ChaosCluster]:
    """Start a cluster, yield it, stop it.

    Args:
        data_dir: Empty, its path short: sockets lie in it.
        node_count: At least 2.
        devices: Declared, of each node.
    """
    async with AsyncExitStack() as stack:
        run_dir = data_dir / "run"
        ports = free_ports(ports_needed(node_count) + 1 + 2 * len(GATEWAYS) + node_count)
        nodes = layout(node_count, data_dir, run_dir, ports)
        rest = iter(ports[ports_needed(node_count) :])
        controller = f"127.0.0.1:{next(rest)}"
        gateways = tuple(
            Gateway(
                name=name, rest_url=f"http://127.0.0.1:{next(rest)}", grpc_address=f"127.0.0.1:{next(rest)}"
            )
            for name in GATEWAYS
        )
        links = {}
        sessions = {node.node_id: f"127.0.0.1:{next(rest)}" for node in nodes}
        for node in nodes:
            node.run_dir.mkdir(mode=0o700, parents=True)
            for name, target in (
                (node.node_id, node.agent),
                (f"{node.node_id} sessions", sessions[node.node_id]),
                (f"{node.node_id} up", controller),
            ):
                links[name] = await stack.enter_async_context(Link(target))
        supervisor = Supervisor(drain_seconds=DRAIN_SECONDS)
        stack.push_async_callback(supervisor.stop)
        commands = [
            *_node_commands(nodes, NodeShape(devices=devices, pool_bytes=POOL_BYTES), links, sessions),
            _controller_command(controller, data_dir),
            *(_gateway_command(gateway, controller, data_dir) for gateway in gateways),
        ]
        try:
            async with asyncio.TaskGroup() as starts:
                for command in commands:
                    starts.create_task(supervisor.start(command))
        except* ConfigError as group:
            raise group.exceptions[0] from None
        cluster = ChaosCluster(
            supervisor=supervisor,
            health={command.title: command.health_address for command in commands},
            nodes=nodes,
            links=links,
            gateways=gateways,
            controller=controller,
            data_dir=data_dir,
        )
        await cluster.until_open()
        yield cluster


def _node_commands(
    nodes: tuple[LocalNode, ...], shape: NodeShape, links: dict[str, Link], sessions: Mapping[str, str]
) -> list[ServiceCommand]:
    commands = []
    for node in nodes:
        agent = agent_settings(node, shape, [links[f"{node.node_id} up"].address])
        agent |= {
            "ADVERTISED_ADDRESS": links[node.node_id].address,
            "SESSION_ADDRESS": sessions[node.node_id],
            "ADVERTISED_SESSION_ADDRESS": links[f"{node.node_id} sessions"].address,
            "DRAIN_SECONDS": str(DRAIN_SECONDS),
            "WORKER_THREADS": "1",
        }
        for name, settings, address in (
            ("store", store_settings(node, shape, nodes), node.store),
            ("node_agent", agent, node.agent),
        ):
            commands.append(
                service_command(
                    name, settings, health_address=address, log_dir=node.log_dir, node_id=node.node_id
                )
            )
    return commands


def _controller_command(address: str, data_dir: Path) -> ServiceCommand:
    (data_dir / "state").mkdir()
    settings = {
        "ADDRESS": address,
        "STATE": f"embedded://{data_dir / 'state' / 'state.db'}",
        "NODE_TIMEOUT_SECONDS": str(NODE_TIMEOUT_SECONDS),
        "NODE_FORGET_SECONDS": str(NODE_FORGET_SECONDS),
        "ORPHAN_GRACE_SECONDS": str(ORPHAN_GRACE_SECONDS),
    }
    return service_command("controller", settings, health_address=address, log_dir=data_dir / "logs")


def _gateway_command(gateway: Gateway, controller: str, data_dir: Path) -> ServiceCommand:
    settings = {
        "ADDRESS": gateway.rest_url.removeprefix("http://"),
        "GRPC_ADDRESS": gateway.grpc_address,
        "CONTROLLERS": json.dumps([controller]),
        "CACHE_DIR": str(data_dir / "cache" / gateway.name),
        "DRAIN_SECONDS": "120",
        "CONTROLLER_PATIENCE_SECONDS": "60",
        "MAX_HOPS": "1000",
    }
    return service_command(
        "gateway",
        settings,
        health_address=gateway.grpc_address,
        log_dir=data_dir / "logs" / gateway.name,
        node_id=gateway.name,
    )


async def until(is_true: Callable[[], object], what: str, limit_seconds: float = UNTIL_SECONDS) -> None:
    """Return when a condition, a plain function or a coroutine's, holds.

    Raises:
        TimeoutError: It did not within the limit.
    """
    loop = asyncio.get_running_loop()
    ends_seconds = loop.time() + limit_seconds
    while True:
        found = is_true()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        if loop.time() > ends_seconds:
            raise TimeoutError(f"after {limit_seconds:g} s it is still not so that {what}")
        await asyncio.sleep(0.1)
