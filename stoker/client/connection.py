"""How a client finds a running cluster: what it was told, the environment, then `stoker up` on this host."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from stoker.process import is_alive

CONTROLLER_VARIABLE = "STOKER_CONTROLLER"
GATEWAY_VARIABLE = "STOKER_GATEWAY"
STORE_VARIABLE = "STOKER_STORE"
HOME_VARIABLE = "STOKER_HOME"
DEFAULT_CONTROLLER = "127.0.0.1:7070"
DEFAULT_GATEWAY = "127.0.0.1:8001"
DEFAULT_STORE = "127.0.0.1:7072"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCluster:
    """What `stoker up` wrote about itself; addresses are host:port."""

    pid: int
    rest_url: str
    gateway: str
    controller: str
    node_agent: str
    store: str
    attach_socket: str = ""
    """Path of the (first) store's attach socket, for `STOKER_ATTACH_SOCKET` and the library."""

    def write(self, path: Path) -> None:
        """Write atomically: a reader sees all of it or nothing."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1))
        partial.replace(path)


def data_home() -> Path:
    """Return the folder `stoker up` uses when it is told none: $STOKER_HOME, else the XDG data folder."""
    if os.environ.get(HOME_VARIABLE):
        return Path(os.environ[HOME_VARIABLE]).expanduser().resolve()
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "stoker"


def cluster_file(data_dir: Path) -> Path:
    """Return where `stoker up` on this data folder says what it runs."""
    return data_dir / "up.json"


def local_cluster(data_dir: Path | None = None) -> LocalCluster | None:
    """Return what runs on this host from `data_dir` (default `data_home()`); None when nothing does."""
    try:
        fields = json.loads(cluster_file(data_dir or data_home()).read_text())
        found = LocalCluster(**fields)
    except (OSError, ValueError, TypeError):
        return None
    return found if is_alive(found.pid) else None


def find_controller(address: str | None = None) -> str:
    """Return the controller's address: the argument, $STOKER_CONTROLLER, `stoker up`, then the default."""
    local = local_cluster()
    return (
        address
        or os.environ.get(CONTROLLER_VARIABLE)
        or (local.controller if local else None)
        or DEFAULT_CONTROLLER
    )


def find_gateway(address: str | None = None) -> str:
    """Return the gateway's gRPC address: the argument, $STOKER_GATEWAY, `stoker up`, then the default."""
    local = local_cluster()
    return (
        address or os.environ.get(GATEWAY_VARIABLE) or (local.gateway if local else None) or DEFAULT_GATEWAY
    )


def find_store(address: str | None = None) -> str:
    """Return the address of this host's store: the argument, $STOKER_STORE, `stoker up`, then the default."""
    local = local_cluster()
    return address or os.environ.get(STORE_VARIABLE) or (local.store if local else None) or DEFAULT_STORE
