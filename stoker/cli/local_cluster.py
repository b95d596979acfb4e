"""A whole cluster on one host: folders, ports, settings of each service, start and stop.

Nothing here outlives the process: children end with it, sockets live in a run folder that is removed, and
`up.json` disappears on the way out.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from stoker.cli.supervisor import ServiceCommand, Supervisor
from stoker.client import AsyncClient
from stoker.client.connection import LocalCluster, cluster_file
from stoker.errors import ConfigError, PeerError
from stoker.v1 import model_pb2

DRAIN_SECONDS = 5.0
NODE_JOIN_SECONDS = 30.0
MAX_SOCKET_PATH = 107
"""Linux: `sun_path` holds 108 bytes with its terminator."""
LONGEST_SOCKET_NAME = len("/worker-0123456789abcdef01234567.sock")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """What to run; ports of 0 mean any free one."""

    data_dir: Path
    host: str = "127.0.0.1"
    rest_port: int = 8000
    grpc_port: int = 8001
    cpu_slots: int = 2
    pool_bytes: int = 0
    """Host memory for checkpoints; 0 = the store decides."""
    deploy: tuple[tuple[str, str], ...] = ()
    """(name, absolute folder or URI) of models deployed once the node has joined."""


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
        cluster = _addresses(options)
        supervisor = Supervisor(drain_seconds=DRAIN_SECONDS)
        described = cluster_file(options.data_dir)
        try:
            async with asyncio.TaskGroup() as starts:
                for command in _commands(options, cluster, run_dir):
                    starts.create_task(supervisor.start(command))
            await _until_joined(cluster)
            cluster.write(described)
            await _deploy(options, cluster)
            yield cluster
        except* ConfigError as group:
            raise group.exceptions[0] from None
        finally:
            described.unlink(missing_ok=True)
            await asyncio.shield(supervisor.stop())


def _commands(options: ClusterOptions, cluster: LocalCluster, run_dir: Path) -> list[ServiceCommand]:
    data, attach = options.data_dir, str(run_dir / "attach.sock")
    logs, state = data / "logs", data / "state"
    for folder in (logs, state):
        folder.mkdir(exist_ok=True)
    drain = {"DRAIN_SECONDS": str(DRAIN_SECONDS)}

    def command(name: str, health_address: str, settings: dict[str, str]) -> ServiceCommand:
        prefix = f"STOKER_{name.upper()}_"
        return ServiceCommand(
            name=name,
            module=f"services.{name}",
            environment={prefix + key: value for key, value in (drain | settings).items()},
            health_address=health_address,
            log_path=logs / f"{name}.log",
        )

    return [
        command(
            "store",
            cluster.store,
            {
                "ADDRESS": cluster.store,
                "RUN_DIR": str(run_dir),
                "POOL_BYTES": str(options.pool_bytes),
                "CACHE_DIR": os.environ.get("STOKER_STORE_CACHE_DIR") or str(data / "checkpoints"),
            },
        ),
        command(
            "controller",
            cluster.controller,
            {"ADDRESS": cluster.controller, "STATE": f"embedded://{state / 'state.db'}"},
        ),
        command(
            "node_agent",
            cluster.node_agent,
            {
                "ADDRESS": cluster.node_agent,
                "STORE": cluster.store,
                "ATTACH_SOCKET": attach,
                "CONTROLLERS": f'["{cluster.controller}"]',
                "RUN_DIR": str(run_dir),
                "LOG_DIR": str(logs / "workers"),
                "CPU_SLOTS": str(options.cpu_slots),
            },
        ),
        command(
            "gateway",
            cluster.gateway,
            {
                "ADDRESS": cluster.rest_url.removeprefix("http://"),
                "GRPC_ADDRESS": cluster.gateway,
                "CONTROLLERS": f'["{cluster.controller}"]',
                "CACHE_DIR": str(data / "cache" / "gateway"),
            },
        ),
    ]


async def _until_joined(cluster: LocalCluster) -> None:
    """Wait until the controller knows this host."""
    async with AsyncClient(gateway=cluster.gateway, controller=cluster.controller) as client:
        try:
            async with asyncio.timeout(NODE_JOIN_SECONDS):
                while not await _joined(client):  # noqa: ASYNC110 - once per start; nobody tells us before
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise ConfigError(
                "the node agent has not joined the controller; see `stoker logs node_agent`"
            ) from None


async def _joined(client: AsyncClient) -> bool:
    try:
        return any(node.reachable for node in await client.nodes())
    except PeerError:
        return False


async def _deploy(options: ClusterOptions, cluster: LocalCluster) -> None:
    async with AsyncClient(gateway=cluster.gateway, controller=cluster.controller) as client:
        for name, uri in options.deploy:
            await client.deploy(model_pb2.ModelSpec(name=name, checkpoint_uri=uri))


def _addresses(options: ClusterOptions) -> LocalCluster:
    rest = _free_port(options.host, options.rest_port, "--port")
    grpc = _free_port(options.host, options.grpc_port, "--grpc-port")
    inner = [_free_port("127.0.0.1", 0, "") for _ in range(3)]
    return LocalCluster(
        pid=os.getpid(),
        rest_url=f"http://{options.host}:{rest}",
        gateway=f"{options.host}:{grpc}",
        controller=f"127.0.0.1:{inner[0]}",
        node_agent=f"127.0.0.1:{inner[1]}",
        store=f"127.0.0.1:{inner[2]}",
    )


def _free_port(host: str, port: int, option: str) -> int:
    """Return `port` when it can be had, or any free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another with {option} (0 = any)"
            ) from error
        return int(probe.getsockname()[1])


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
