"""What `stoker top` shows: one look at the nodes and the busiest replicas, as tables. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from stoker.units import format_bytes, format_count, format_seconds
from stoker.v1 import controller_pb2, node_agent_pb2

READY = node_agent_pb2.REPLICA_STATE_READY
TOP_REPLICAS = 30
"""Rows of replicas, the busiest first."""
TOP_NODES = 20
"""Rows of nodes: those that need somebody first, then those with the most sessions."""


def live_view(nodes: Sequence[controller_pb2.Node], replicas: Sequence[node_agent_pb2.Replica]) -> Group:
    """Return one look at the cluster."""
    return Group(nodes_table(nodes, replicas), "", replicas_table(replicas))


def nodes_table(nodes: Sequence[controller_pb2.Node], replicas: Sequence[node_agent_pb2.Replica]) -> Table:
    """Return a row per node: who does not answer or is not open first, then the busiest."""
    slots = sum(len(node.report.devices) for node in nodes)
    taken = sum(len(replica.devices) for replica in replicas)
    table = _table(
        f"{format_count(len(nodes), 'node')}, {taken} of {format_count(slots, 'slot')} taken, "
        f"{format_count(len(replicas), 'replica')}",
        ("NODE", "STATE", "SLOTS TAKEN", "RUNNING", "WAITING", "LOADING", "WARM", "POOL FREE"),
    )
    on_node: dict[str, list[node_agent_pb2.Replica]] = {}
    for replica in replicas:
        on_node.setdefault(replica.node_id, []).append(replica)

    def order(node: controller_pb2.Node) -> tuple[bool, int, str]:
        node_id = node.report.node_id
        return node_state(node) == "ready", -sum(map(_sessions, on_node.get(node_id, ()))), node_id

    for node in sorted(nodes, key=order)[:TOP_NODES]:
        report, here = node.report, on_node.get(node.report.node_id, [])
        table.add_row(
            report.node_id,
            node_state(node),
            f"{sum(len(replica.devices) for replica in here)}/{len(report.devices)}",
            str(sum(replica.running_sessions for replica in here)),
            str(sum(replica.waiting_sessions for replica in here)),
            str(sum(replica.state != READY for replica in here)),
            str(report.warm_workers),
            f"{format_bytes(report.store.pool.free_bytes)} of {format_bytes(report.store.pool.total_bytes)}",
        )
    _say_what_is_left(table, len(nodes) - TOP_NODES, "nodes: stoker nodes")
    return table


def replicas_table(replicas: Sequence[node_agent_pb2.Replica]) -> Table:
    """Return a row per replica, the busiest first."""
    table = _table(None, ("REPLICA", "MODEL", "NODE", "STATE", "RUNNING", "WAITING", "IDLE"))
    busiest = sorted(replicas, key=lambda each: (-_sessions(each), each.idle_seconds, each.replica_id))
    for replica in busiest[:TOP_REPLICAS]:
        state = node_agent_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_").lower()
        if replica.state != READY:
            state += f" {replica.loaded_fraction:.0%}"
        table.add_row(
            replica.replica_id,
            replica.model,
            replica.node_id,
            state,
            str(replica.running_sessions),
            str(replica.waiting_sessions),
            format_seconds(replica.idle_seconds),
        )
    _say_what_is_left(table, len(replicas) - TOP_REPLICAS, "replicas: stoker ps")
    return table


def node_state(node: controller_pb2.Node) -> str:
    """Return how a node is used: `ready`, `cordoned`, `drained`, `draining`, or since when it is silent."""
    if not node.reachable:
        return f"unreachable {format_seconds(node.last_seen_seconds)}"
    if node.scheduling == controller_pb2.NODE_SCHEDULING_CORDONED:
        return "cordoned"
    if node.scheduling == controller_pb2.NODE_SCHEDULING_DRAINED:
        return "drained"
    return "draining" if node.report.draining else "ready"


def _table(title: str | None, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for column in columns:
        table.add_column(column)
    return table


def _say_what_is_left(table: Table, left: int, where: str) -> None:
    if left > 0:
        table.caption = f"and {left} more {where}"


def _sessions(replica: node_agent_pb2.Replica) -> int:
    return replica.running_sessions + replica.waiting_sessions
