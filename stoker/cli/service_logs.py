"""Where the services of `stoker up` print: one file each, or one per node where several run on this host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stoker.errors import NotFound

PER_NODE = frozenset({"store", "node_agent"})
"""Services that every node has one of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLog:
    """A service's log.

    Attributes:
        node_id: Of which node; empty = there is only one.
        path: The file.
    """

    node_id: str
    path: Path


def find_logs(folder: Path, service: str, *, node: str = "") -> list[ServiceLog]:
    """Return the logs of a service, by node; of the last run, where runs had different numbers of nodes.

    Args:
        folder: `logs` below the data folder of `stoker up`.
        service: Its name, e.g. `store`.
        node: Only this node's; empty = every node's.

    Raises:
        NotFound: There is none.
    """
    name = f"{service}.log"
    alone = [ServiceLog(node_id="", path=path) for path in [folder / name] if path.is_file()]
    by_node = [
        ServiceLog(node_id=path.parent.name, path=path)
        for path in sorted(folder.glob(f"*/{name}"), key=_number)
        if service in PER_NODE
    ]
    if node:
        found = [log for log in by_node if log.node_id == node]
        if not found:
            known = (
                ", ".join(log.node_id for log in by_node) or "there is one node without a folder of its own"
            )
            raise NotFound(f"{folder} has no log of {service} on node {node!r}; nodes: {known}")
        return found
    found = max(alone, by_node, key=_last_written)
    if not found:
        raise NotFound(
            f"no {name} in {folder}: is that below the data folder of `stoker up`? give it with --data"
        )
    return found


def _number(path: Path) -> tuple[int, str]:
    """Sort node-10 behind node-9."""
    _, _, number = path.parent.name.rpartition("-")
    return (int(number) if number.isdecimal() else 0, path.parent.name)


def _last_written(logs: list[ServiceLog]) -> float:
    return max((log.path.stat().st_mtime for log in logs), default=float("-inf"))
