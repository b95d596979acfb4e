"""`stoker ps`, `status`, `logs`: what runs, where, and what it printed."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path
from typing import Annotated

import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stoker.cli.models import ControllerOption
from stoker.cli.output import Format, FormatOption, as_json, console, print_json, print_table
from stoker.cli.service_logs import ServiceLog, find_logs
from stoker.client import AsyncClient
from stoker.client.connection import data_home
from stoker.errors import NotFound, PeerError
from stoker.rpc import connect, translated
from stoker.units import format_bytes, format_count, format_seconds
from stoker.v1 import controller_pb2, node_agent_pb2

SERVICES = ("gateway", "controller", "node_agent", "store")
DataOption = Annotated[Path | None, typer.Option("--data", help="data folder of `stoker up`")]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("ps")(list_replicas)
    app.command()(status)
    app.command()(logs)
    app.command()(health)


def list_replicas(
    model: Annotated[str, typer.Argument(help="only this model's")] = "",
    controller: ControllerOption = None,
    output: FormatOption = Format.text,
) -> None:
    """List the replicas: which model runs where, and how busy it is."""

    async def work() -> list[node_agent_pb2.Replica]:
        async with AsyncClient(controller=controller) as client:
            return list(await client.replicas(model))

    replicas = asyncio.run(work())
    if output is Format.json:
        print_json([as_json(replica) for replica in replicas])
        return
    print_table(
        ("REPLICA", "MODEL", "STATE", "NODE", "DEVICES", "RUNNING", "WAITING", "IDLE", "START", "PID"),
        (_replica_row(replica) for replica in replicas),
        empty="no replicas; a request, or `stoker deploy --wait`, starts one",
    )


def _replica_row(replica: node_agent_pb2.Replica) -> tuple[str, ...]:
    state = node_agent_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_").lower()
    if replica.state == node_agent_pb2.REPLICA_STATE_STARTING:
        state += f" {replica.loaded_fraction:.0%}"
    return (
        replica.replica_id,
        replica.model,
        state,
        replica.node_id,
        ",".join(map(str, replica.devices)),
        str(replica.running_sessions),
        str(replica.waiting_sessions),
        format_seconds(replica.idle_seconds),
        format_seconds(replica.timings.total_seconds) if replica.timings.total_seconds else "-",
        str(replica.worker_pid),
    )


def status(controller: ControllerOption = None, output: FormatOption = Format.text) -> None:
    """Show the cluster at a glance: controller, nodes, their devices and pools."""

    async def work() -> tuple[controller_pb2.ClusterStatus, list[controller_pb2.Node]]:
        async with AsyncClient(controller=controller) as client:
            return await client.status(), list(await client.nodes())

    cluster, nodes = asyncio.run(work())
    if output is Format.json:
        print_json({"cluster": as_json(cluster), "nodes": [as_json(node) for node in nodes]})
        return
    console.print(
        f"stoker {cluster.version} · leader {cluster.leader} · state {cluster.state_backend} · "
        f"{format_count(cluster.models, 'model')} · {format_count(cluster.replicas, 'replica')} · "
        f"{format_count(cluster.nodes, 'node')}",
        highlight=False,
    )
    print_table(
        ("NODE", "STATE", "DEVICES", "WARM WORKERS", "REPLICAS", "POOL FREE", "POOL", "PAGES", "AGENT"),
        (_node_row(node) for node in nodes),
        empty="no nodes have joined",
    )


def _node_row(node: controller_pb2.Node) -> tuple[str, ...]:
    report, pool = node.report, node.report.store.pool
    state = "draining" if report.draining else "ready" if node.reachable else "unreachable"
    kinds = sorted({device.kind for device in report.devices})
    return (
        report.node_id,
        state if node.reachable else f"{state} {format_seconds(node.last_seen_seconds)}",
        f"{len(report.devices)} {'/'.join(kinds)}",
        str(report.warm_workers),
        str(len(report.replicas)),
        format_bytes(pool.free_bytes),
        format_bytes(pool.total_bytes),
        format_bytes(pool.page_bytes) if pool.page_bytes else "-",
        report.agent_address,
    )


def health(
    address: Annotated[str, typer.Argument(help="host:port or unix:path of any service")],
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds")] = 3.0,
) -> None:
    """Ask a service whether it serves; exit 0 when it does, 1 otherwise (for container health checks)."""

    async def work() -> bool:
        async with connect(address) as channel:
            with translated(address):
                stub = health_pb2_grpc.HealthStub(channel)
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    if not asyncio.run(work()):
        raise PeerError(f"{address} is not serving")
    console.print("serving", highlight=False)


def logs(
    source: Annotated[str, typer.Argument(help=f"replica id, model name, or one of {', '.join(SERVICES)}")],
    tail: Annotated[int, typer.Option("--tail", "-n", min=1, help="lines")] = 100,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on as lines come")] = False,
    node: Annotated[
        str, typer.Option(help="only this node's store or node_agent, where there are several")
    ] = "",
    data: DataOption = None,
    controller: ControllerOption = None,
) -> None:
    """Print what a replica's worker, or a service of `stoker up`, has logged; of every node, one by one."""
    if source in SERVICES and not follow:
        _print_service_logs(find_logs((data or data_home()) / "logs", source, node=node), tail)
        return

    async def work() -> None:
        async with AsyncClient(controller=controller) as client:
            replica_id, address = await _agent_of(client, source)
            async for line in client.logs(address, replica_id, tail_lines=tail, follow=follow):
                console.print(line, highlight=False, markup=False)

    asyncio.run(work())


def _print_service_logs(found: list[ServiceLog], tail: int) -> None:
    for log in found:
        if log.node_id and len(found) > 1:
            console.print(f"== {log.node_id}: {log.path} ==", highlight=False, markup=False, style="bold")
        with log.path.open(errors="replace") as lines:
            for line in deque(lines, maxlen=tail):
                console.print(line.rstrip("\n"), highlight=False, markup=False)


async def _agent_of(client: AsyncClient, source: str) -> tuple[str, str]:
    """Return (replica id, agent address) of the replica, or of the model's first replica."""
    if source == "node_agent":
        for node in await client.nodes():
            return "", node.report.agent_address
    for replica in await client.replicas():
        if source in (replica.replica_id, replica.model):
            for node in await client.nodes():
                if node.report.node_id == replica.node_id:
                    return replica.replica_id, node.report.agent_address
    raise NotFound(f"no replica or model {source!r} runs; see `stoker ps` (services: {', '.join(SERVICES)})")
