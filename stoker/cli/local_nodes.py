"""The nodes of `stoker up`: a store and an agent each, their names, folders, addresses and settings. Pure.

One node is this host: its name, its GPUs, and folders as they always were (`logs/store.log`, `checkpoints/`).
Several are `node-1` to `node-N` on one host, with declared devices (CPU slots) and a folder each:

| path below the data folder | what |
| --- | --- |
| `logs/<node>/store.log`, `node_agent.log`, `workers/` | what its processes print |
| `nodes/<node>/checkpoints/` | its store's own copies of remote checkpoints |
| `run/<number>/` | its sockets; gone when it stops |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker.cli.supervisor import ServiceCommand

AUTO_POOL_FRACTION = 0.25
"""Of the memory that is available, for the pools of several nodes together; one store decides for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeShape:
    """What each node of a local cluster has.

    Attributes:
        devices: Declared slots; None = what the host has, with `cpu_slots` where it has no GPU.
        cpu_slots: Slots of a host without GPUs.
        pool_bytes: Of its store; 0 = the store decides.
        disk_bytes_per_second: Its disk is made that slow; 0 = as it is.
        network_bytes_per_second: Of its reads from other nodes, and from remote origins; 0 = as they are.
    """

    devices: int | None = None
    cpu_slots: int = 2
    pool_bytes: int = 0
    disk_bytes_per_second: float = 0.0
    network_bytes_per_second: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNode:
    """One node's names, folders and addresses (`host:port`).

    Attributes:
        node_id: Its name; empty = the host's.
        run_dir: For its sockets.
        log_dir: For its logs.
        cache_dir: For its store's copies of remote checkpoints.
        agent: Its agent's address.
        store: Its store's address.
        peer: Where its store gives chunks to the other nodes'; empty = it is alone.
    """

    node_id: str
    run_dir: Path
    log_dir: Path
    cache_dir: Path
    agent: str
    store: str
    peer: str = ""

    @property
    def attach_socket(self) -> Path:
        """Where its store hands out memory."""
        return self.run_dir / "attach.sock"


def layout(count: int, data_dir: Path, run_dir: Path, ports: Sequence[int]) -> tuple[LocalNode, ...]:
    """Return the nodes.

    Args:
        count: How many.
        data_dir: Of the cluster.
        run_dir: Of the cluster.
        ports: Free ones, `ports_needed(count)`.
    """
    addresses = [f"127.0.0.1:{port}" for port in ports]
    if count == 1:
        alone = LocalNode(
            node_id="",
            run_dir=run_dir,
            log_dir=data_dir / "logs",
            cache_dir=data_dir / "checkpoints",
            agent=addresses[0],
            store=addresses[1],
        )
        return (alone,)
    return tuple(
        LocalNode(
            node_id=f"node-{number}",
            run_dir=run_dir / str(number),
            log_dir=data_dir / "logs" / f"node-{number}",
            cache_dir=data_dir / "nodes" / f"node-{number}" / "checkpoints",
            agent=addresses[3 * number - 3],
            store=addresses[3 * number - 2],
            peer=addresses[3 * number - 1],
        )
        for number in range(1, count + 1)
    )


def ports_needed(count: int) -> int:
    """Return how many ports `count` nodes listen on."""
    return 2 if count == 1 else 3 * count


def pool_of_each(count: int, pool_bytes: int, available_bytes: int) -> int:
    """Return the pool of each of `count` stores: as asked for, else a share; 0 = one store decides itself."""
    if pool_bytes or count == 1:
        return pool_bytes
    return int(available_bytes * AUTO_POOL_FRACTION) // count


def store_settings(node: LocalNode, shape: NodeShape, all_nodes: Sequence[LocalNode]) -> dict[str, str]:
    """Return the settings of a node's store, without their prefix."""
    paced = {
        "disk": shape.disk_bytes_per_second,
        "peer": shape.network_bytes_per_second,
        "remote": shape.network_bytes_per_second,
    }
    settings = {
        "ADDRESS": node.store,
        "RUN_DIR": str(node.run_dir),
        "POOL_BYTES": str(shape.pool_bytes),
        "CACHE_DIR": str(node.cache_dir),
    }
    if any(paced.values()):
        settings["PACED_BYTES_PER_SECOND"] = json.dumps(paced)
    if node.peer:
        settings |= {"PEER_ADDRESS": node.peer, "PEERS": json.dumps([other.peer for other in all_nodes])}
    return settings


def agent_settings(node: LocalNode, shape: NodeShape, controllers: Sequence[str]) -> dict[str, str]:
    """Return the settings of a node's agent, without their prefix."""
    settings = {
        "ADDRESS": node.agent,
        "STORE": node.store,
        "ATTACH_SOCKET": str(node.attach_socket),
        "CONTROLLERS": json.dumps(list(controllers)),
        "RUN_DIR": str(node.run_dir),
        "LOG_DIR": str(node.log_dir / "workers"),
        "CPU_SLOTS": str(shape.devices or shape.cpu_slots),
    }
    if node.node_id:
        settings["NODE_ID"] = node.node_id
    if shape.devices is not None:
        settings["USE_GPUS"] = "false"
    return settings


def service_command(
    name: str, settings: dict[str, str], *, health_address: str, log_dir: Path, node_id: str = ""
) -> ServiceCommand:
    """Return how to start a service.

    Args:
        name: Of the service, e.g. `node_agent`.
        settings: Without their prefix.
        health_address: `host:port` of its gRPC health.
        log_dir: Where `<name>.log` goes.
        node_id: Of which node, where there are several.
    """
    prefix = f"STOKER_{name.upper()}_"
    return ServiceCommand(
        name=name,
        module=f"services.{name}",
        environment={prefix + key: value for key, value in settings.items()},
        health_address=health_address,
        log_path=log_dir / f"{name}.log",
        node_id=node_id,
    )
