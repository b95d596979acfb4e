"""The node agent's parts and their lifecycle."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from services.node_agent.background import Background
from services.node_agent.devices import find_devices
from services.node_agent.host import Host
from services.node_agent.reporter import Reporter, address_for_others
from services.node_agent.reports import Identity
from services.node_agent.servicer import Servicer
from services.node_agent.sessions.session_listener import SessionListener
from services.node_agent.settings import NodeAgentSettings
from services.node_agent.store_peers import StorePeers
from services.node_agent.store_watch import StoreWatch
from services.node_agent.workers import session_socket
from services.node_agent.workers.replica_workers import SOCKET_SUFFIX, STORE_SUFFIX
from stoker import __version__, log
from stoker.errors import ConfigError
from stoker.ids import new_id
from stoker.rpc import Server
from stoker.v1.node_agent_pb2_grpc import add_NodeAgentServicer_to_server

_LONGEST_SOCKET_NAME = len("/worker-4194304-abcdef-99999.sock")
_SOCKET_PATH_BYTES = 107


class NodeAgentService:
    """Builds and runs the agent; see `stoker.serving.Service`."""

    def __init__(self, settings: NodeAgentSettings, ended_within: asyncio.Event) -> None:
        self._settings = settings
        self._background = Background(on_crash=ended_within.set)
        self._server = Server(["stoker.v1.NodeAgent"])
        self._host: Host | None = None
        self._listener: SessionListener | None = None

    async def start(self) -> None:
        """Find the devices, fill the pool, listen, begin to report."""
        settings = self._settings
        prepare_run_dir(settings.run_dir)
        port = self._server.bind(settings.address)
        self._listener = SessionListener(
            settings.session_address or f"{settings.address.rpartition(':')[0]}:0",
            settings.advertised_session_address,
        )
        devices = await asyncio.to_thread(
            find_devices, cpu_slots=settings.cpu_slots, use_gpus=settings.use_gpus
        )
        identity = Identity(
            node_id=settings.node_id,
            boot_id=new_id("boot"),
            agent_address=address_for_others(settings.advertised_address, settings.address, port),
            store_address=settings.advertised_store or settings.store,
            devices=devices,
            labels=settings.labels,
            version=__version__,
        )
        log.get().info("devices.found", devices=[device.name for device in devices])
        peers = StorePeers(
            settings.store, lambda: store.status is not None and bool(store.status.peer_address)
        )
        reporter = Reporter(
            identity,
            heartbeat_seconds=settings.heartbeat_seconds,
            controllers=settings.controllers,
            peers_named=peers.named,
        )

        def store_changed(is_new: bool) -> None:  # noqa: FBT001 - as StoreWatch calls it
            reporter.change(is_new)
            if is_new:
                peers.store_changed()

        store = StoreWatch(settings.store, store_changed)
        host = self._host = Host(settings, devices, self._background, reporter.change)
        servicer = Servicer(host, lambda: reporter.build(host, store), self._listener)
        add_NodeAgentServicer_to_server(servicer, self._server.grpc_server)
        host.start()
        self._background.spawn(self._listener.run(), "sessions")
        self._background.spawn(store.run(), "store watch")
        self._background.spawn(peers.run(), "store peers")
        if settings.controllers:
            self._background.spawn(reporter.run(host, store), "reporter")
        await self._server.start()
        log.get().info("agent.listening", address=identity.agent_address, node_id=settings.node_id)

    async def stop_serving(self) -> None:
        """See `stoker.serving.Service`."""
        await self._server.set_serving(serving=False)

    async def drain(self, grace_seconds: float) -> None:
        """Let running sessions end; the controller is told that this host drains."""
        if self._host is not None:
            await self._host.drain(grace_seconds)

    async def close(self) -> None:
        """End the workers, then everything else."""
        if self._host is not None:
            await self._host.close()
        await self._server.stop()
        await self._background.close()
        if self._listener is not None:
            self._listener.close()


def prepare_run_dir(run_dir: Path) -> None:
    """Make the folder, and remove sockets that nobody listens on: of agents and workers that were killed.

    Raises:
        ConfigError: It can't be made, or its path is too long for a unix socket.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the run folder {run_dir}: {error.strerror}; set another") from error
    if len(str(run_dir).encode()) + _LONGEST_SOCKET_NAME > _SOCKET_PATH_BYTES:
        raise ConfigError(f"the run folder {run_dir} is too long a path for unix sockets: set a shorter one")
    for path in run_dir.glob("worker-*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                for suffix in (path.suffix, session_socket.SUFFIX, SOCKET_SUFFIX, STORE_SUFFIX):
                    path.with_suffix(suffix).unlink(missing_ok=True)
            except OSError:
                continue  # somebody else's, or busy: not ours to remove
