"""A whole cluster on one host: folders, ports, settings of each service, start and stop.

Nothing here outlives the process: children end with it, sockets live in a run folder that is removed, and
`up.json` disappears on the way out.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from stoker.cli.free_ports import free_ports
from stoker.cli.local_nodes import (
    LocalNode,
    NodeShape,
    agent_settings,
    layout,
    pool_of_each,
    ports_needed,
    service_command,
    store_settings,
)
from stoker.cli.supervisor import ServiceCommand, Supervisor
from stoker.client import AsyncClient
from stoker.client.connection import LocalCluster, cluster_file
from stoker.errors import ConfigError, PeerError
from stoker.v1 import model_pb2

DRAIN_SECONDS = 5.0
NODE_JOIN_SECONDS = 90.0
MAX_SOCKET_PATH = 107
"""Linux: `sun_path` holds 108 bytes with its terminator."""
LONGEST_SOCKET_NAME = len("/12/worker-0123456789abcdef01234567.sock")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """What to run; ports of 0 mean any free one."""

    data_dir: Path
    host: str = "127.0.0.1"
    rest_port: int = 8000
    grpc_port: int = 8001
    node_count: int = 1
    """Nodes on this host, a store and an agent each; with several the devices are declared ones."""
    devices: int | None = None
    """Declared devices of each node; None = `cpu_slots`, or the host's GPUs where it is the only node."""
    cpu_slots: int = 2
    pool_bytes: int = 0
    """Each node's host memory for checkpoints; 0 = automatic."""
    disk_bytes_per_second: float = 0.0
    """Each node's disk is made that slow; 0 = as it is."""
    network_bytes_per_second: float = 0.0
    """So are each node's reads from other nodes and from remote origins."""
    deploy: tuple[tuple[str, str], ...] = ()
    """(name, absolute folder or URI) of models deployed once the node has joined."""
    settings: tuple[tuple[str, str, str], ...] = ()
    """(service, name, value) of further settings, e.g. `("controller", "may_migrate", "true")`."""


async def run_cluster(options: ClusterOptions, ready: Callable[[LocalCluster], object]) -> None:
    """Run a cluster until cancelled; `ready` is called once when everything answers.

    Raises:
        ConfigError: The data folder is in use, a port is taken, or a service did not start.
    """
    async with running_cluster(options) as cluster:
        ready(cluster)
        await asyncio.Event().wait()


@asynccontextmanager
async def running_cluster(options: ClusterOptions) -> AsyncIterator[LocalCluster]:
    """Start a cluster, yield its addresses, stop it: nothing is left behind."""
    options.data_dir.mkdir(parents=True, exist_ok=True)
    with _locked(options.data_dir), _run_folder(options.data_dir) as run_dir:
        rest, grpc, controller, *ports = free_ports(3 + ports_needed(options.node_count))
        nodes = layout(options.node_count, options.data_dir, run_dir, ports)
        edge = (
            _listenable(options.host, options.rest_port or rest, "--port"),
            _listenable(options.host, options.grpc_port or grpc, "--grpc-port"),
        )
        cluster = _addresses(options, edge, controller, nodes)
        supervisor = Supervisor(drain_seconds=DRAIN_SECONDS)
        described = cluster_file(options.data_dir)
        try:
            async with asyncio.TaskGroup() as starts:
                for command in with_settings(_commands(options, cluster, nodes), options.settings):
                    starts.create_task(supervisor.start(command))
            await _until_joined(cluster, options.node_count)
            cluster.write(described)
            await _deploy(options, cluster)
            yield cluster
        except* ConfigError as group:
            raise group.exceptions[0] from None
        finally:
            described.unlink(missing_ok=True)
            await asyncio.shield(supervisor.stop())


def with_settings(
    commands: Sequence[ServiceCommand], settings: Sequence[tuple[str, str, str]]
) -> list[ServiceCommand]:
    """Return the commands with further settings; a service refuses names that it doesn't know.

    Args:
        commands: Of all services.
        settings: (service, name, value), for each process of that service.

    Raises:
        ConfigError: There is no such service, or `stoker up` decides this setting itself.
    """
    found = list(commands)
    for service, name, value in settings:
        variable = f"STOKER_{service.upper()}_{name.upper()}"
        if all(command.name != service for command in found):
            services = ", ".join(sorted({command.name for command in found}))
            raise ConfigError(f"--set {service}.{name}: there is no service {service!r}; known: {services}")
        for number, command in enumerate(found):
            if command.name != service:
                continue
            if variable in command.environment:
                raise ConfigError(f"--set {service}.{name}: `stoker up` decides that itself")
            found[number] = replace(command, environment={**command.environment, variable: value})
    return found


def _commands(
    options: ClusterOptions, cluster: LocalCluster, nodes: tuple[LocalNode, ...]
) -> list[ServiceCommand]:
    data = options.data_dir
    logs, state = data / "logs", data / "state"
    for folder in (logs, state, *(node.run_dir for node in nodes)):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    drain = {"DRAIN_SECONDS": str(DRAIN_SECONDS)}
    controllers = json.dumps([cluster.controller])
    controller = service_command(
        "controller",
        drain | {"ADDRESS": cluster.controller, "STATE": f"embedded://{state / 'state.db'}"},
        health_address=cluster.controller,
        log_dir=logs,
    )
    gateway = service_command(
        "gateway",
        drain
        | {
            "ADDRESS": cluster.rest_url.removeprefix("http://"),
            "GRPC_ADDRESS": cluster.gateway,
            "CONTROLLERS": controllers,
            "CACHE_DIR": str(data / "cache" / "gateway"),
        },
        health_address=cluster.gateway,
        log_dir=logs,
    )
    stores, agents = _node_commands(nodes, _shape(options), drain, cluster.controller)
    return [*stores, controller, *agents, gateway]  # they stop in the opposite order


def _node_commands(
    nodes: tuple[LocalNode, ...], shape: NodeShape, drain: dict[str, str], controller: str
) -> tuple[list[ServiceCommand], list[ServiceCommand]]:
    """Return the nodes' stores and agents."""
    stores, agents = [], []
    for node in nodes:
        settings = store_settings(node, shape, nodes)
        told = os.environ.get("STOKER_STORE_CACHE_DIR")
        if told and len(nodes) == 1:
            settings["CACHE_DIR"] = told
        stores.append(
            service_command(
                "store",
                drain | settings,
                health_address=node.store,
                log_dir=node.log_dir,
                node_id=node.node_id,
            )
        )
        agents.append(
            service_command(
                "node_agent",
                drain | agent_settings(node, shape, [controller]),
                health_address=node.agent,
                log_dir=node.log_dir,
                node_id=node.node_id,
            )
        )
    return stores, agents


def _shape(options: ClusterOptions) -> NodeShape:
    declared = options.devices or (options.cpu_slots if options.node_count > 1 else None)
    available_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return NodeShape(
        devices=declared,
        cpu_slots=options.cpu_slots,
        pool_bytes=pool_of_each(options.node_count, options.pool_bytes, available_bytes),
        disk_bytes_per_second=options.disk_bytes_per_second,
        network_bytes_per_second=options.network_bytes_per_second,
    )


async def _until_joined(cluster: LocalCluster, count: int) -> None:
    """Wait until the controller knows all nodes."""
    async with AsyncClient(gateway=cluster.gateway, controller=cluster.controller) as client:
        try:
            async with asyncio.timeout(NODE_JOIN_SECONDS):
                while await _joined(client) < count:  # noqa: ASYNC110 - once per start; nobody tells us before
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise ConfigError(
                f"not all of {count} node agents have joined the controller; see node_agent.log in the logs"
            ) from None


async def _joined(client: AsyncClient) -> int:
    try:
        return sum(node.reachable for node in await client.nodes())
    except PeerError:
        return 0


async def _deploy(options: ClusterOptions, cluster: LocalCluster) -> None:
    async with AsyncClient(gateway=cluster.gateway, controller=cluster.controller) as client:
        for name, uri in options.deploy:
            await client.deploy(model_pb2.ModelSpec(name=name, checkpoint_uri=uri))


def _addresses(
    options: ClusterOptions, edge: tuple[int, int], controller: int, nodes: tuple[LocalNode, ...]
) -> LocalCluster:
    rest, grpc = edge
    return LocalCluster(
        pid=os.getpid(),
        rest_url=f"http://{options.host}:{rest}",
        gateway=f"{options.host}:{grpc}",
        controller=f"127.0.0.1:{controller}",
        node_agent=nodes[0].agent,
        store=nodes[0].store,
        attach_socket=str(nodes[0].attach_socket),
    )


def _listenable(host: str, port: int, option: str) -> int:
    """Return `port` when it can be had.

    Raises:
        ConfigError: Somebody has it; says which option chooses another.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another with {option} (0 = any)"
            ) from error
    return port


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Hold the data folder for this process alone."""
    path = data_dir / "lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ConfigError(
                f"another `stoker up` (pid {file.read().strip() or '?'}) uses {data_dir}: "
                f"stop it with `stoker down`, or give another folder with --data"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def _run_folder(data_dir: Path) -> Iterator[Path]:
    """Yield a folder for sockets whose path is short enough for the kernel; removed afterwards."""
    folder = data_dir / "run"
    if len(str(folder)) + LONGEST_SOCKET_NAME > MAX_SOCKET_PATH:
        folder = Path(tempfile.mkdtemp(prefix="stoker-"))
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed: we hold the lock
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
