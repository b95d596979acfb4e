"""Settings of the node agent: `STOKER_NODE_AGENT_*`."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from stoker.settings import ServiceSettings


class NodeAgentSettings(ServiceSettings):
    """What the operator chooses for one host."""

    model_config = SettingsConfigDict(env_prefix="STOKER_NODE_AGENT_")

    node_id: str = Field(default_factory=socket.gethostname, min_length=1, max_length=128)
    """Name of this host in the cluster; unique. Default: the host's name."""

    address: str = "127.0.0.1:7071"
    """`host:port` to listen on; port 0 takes a free one."""

    advertised_address: str = ""
    """`host:port` under which gateways and controllers reach this agent; default: `address`."""

    session_address: str = ""
    """`host:port` to listen on for gateways' sessions, which travel over plain TCP beside gRPC; port 0 takes
    a free one. Default: a free port of `address`'s host. Gateways that can't reach it use gRPC: slower."""

    advertised_session_address: str = ""
    """`host:port` under which gateways reach `session_address`; default: its port, on the host where they
    reach gRPC."""

    store: str = "127.0.0.1:7072"
    """`host:port` of this host's checkpoint store."""

    advertised_store: str = ""
    """`host:port` under which gateways reach this host's store; default: `store`."""

    attach_socket: Path = Path(tempfile.gettempdir()) / "stoker" / "attach.sock"
    """Unix socket of this host's store, for workers."""

    controllers: tuple[str, ...] = ("127.0.0.1:7070",)
    """`host:port` of every controller; the agent finds the leading one."""

    run_dir: Path = Path(tempfile.gettempdir()) / "stoker"
    """Folder for the workers' sockets; created when missing. Keep it short: a socket's path has 107 bytes."""

    log_dir: Path = Path(tempfile.gettempdir()) / "stoker" / "logs"
    """Folder for what workers print; created when missing, its files are bounded in size and number."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Reported with the host, for placement; a JSON object."""

    cpu_slots: int = Field(default=2, ge=1, le=1024)
    """Replicas that may run side by side on the processor; not used where GPUs are found."""

    use_gpus: bool = True
    """False: offer CPU slots even where GPUs are found."""

    prestarted_workers: int = Field(default=1, ge=0, le=64)
    """Workers kept with their imports done and no model, so that a start does not wait for Python."""

    max_prestarted_workers: int = Field(default=4, ge=0, le=64)
    """What the controller's forecasts may raise `prestarted_workers` to, never above the number of slots;
    where that is 0 they start none."""

    worker_threads: int = Field(default=0, ge=0, le=1024)
    """Threads of one worker's arithmetic; 0 = one less than there are processors, see `default_threads`."""

    pool_niceness: int = Field(default=10, ge=0, le=19)
    """How much a worker that no order waits for gives way while it imports: nice(1), 0 = not at all."""

    refill_pause_seconds: float = Field(default=1.0, ge=0)
    """After a load, before the next worker is pre-started; one that an order waits for starts at once."""

    fork_server: bool = True
    """Fork workers from a process that has their imports done and shares its memory with them; it comes to be
    with the first worker. False: every worker imports for itself, in seconds of processor time."""

    worker_env: dict[str, str] = Field(default_factory=dict)
    """Further environment variables of workers; a JSON object."""

    heartbeat_seconds: float = Field(default=1.0, gt=0, le=60)
    """Longest time between two reports."""

    load_timeout_seconds: float = Field(default=600.0, gt=0)
    """A load that takes longer has failed."""

    spawn_timeout_seconds: float = Field(default=300.0, gt=0)
    """A worker that takes longer to become warm is ended and replaced."""

    keep_seconds: float = Field(default=120.0, ge=0, le=3600)
    """Longest time that a session goes on without its gateway, and that its tokens are kept; 0 = not at all.
    Asked for by requests with an idempotency key only."""

    max_sessions: int = Field(default=1024, ge=1)
    """Sessions of one replica at most, running and waiting; more are refused."""
