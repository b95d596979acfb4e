"""What operators use: `nodes`, `explain`, `drain`, `undrain`, `cordon`, `migrate`, `events`, `top`."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer
from rich.live import Live

from stoker.cli.live_view import live_view, node_state
from stoker.cli.models import ControllerOption
from stoker.cli.output import Format, FormatOption, as_json, console, print_json, print_table
from stoker.client import AsyncClient
from stoker.units import format_bytes, format_count, format_rate, format_seconds
from stoker.v1 import controller_pb2, start_pb2


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("nodes")(list_nodes)
    app.command()(explain)
    app.command()(drain)
    app.command()(migrate)
    app.command()(undrain)
    app.command()(cordon)
    app.command()(events)
    app.command()(top)


def list_nodes(controller: ControllerOption = None, output: FormatOption = Format.text) -> None:
    """List the nodes: how they are used, what is free, how fast their tiers are."""

    async def work() -> list[controller_pb2.Node]:
        async with AsyncClient(controller=controller) as client:
            return list(await client.nodes())

    nodes = asyncio.run(work())
    if output is Format.json:
        print_json([as_json(node) for node in nodes])
        return
    print_table(
        ("NODE", "STATE", "SLOTS FREE", "WARM", "MEMORY FREE", "POOL FREE", "TIERS", "LABELS"),
        (_node_row(node) for node in nodes),
        empty="no nodes have joined",
    )


def _node_row(node: controller_pb2.Node) -> tuple[str, ...]:
    report = node.report
    taken = {device for replica in report.replicas for device in replica.devices}
    rates = (
        f"{rate.stage} {format_rate(rate.bytes_per_second, 1.0)}"
        for rate in report.store.bandwidths
        if rate.bytes_per_second
    )
    return (
        report.node_id,
        node_state(node),
        f"{len(report.devices) - len(taken)}/{len(report.devices)}",
        str(report.warm_workers),
        format_bytes(report.memory_free_bytes),
        f"{format_bytes(report.store.pool.free_bytes)} of {format_bytes(report.store.pool.total_bytes)}",
        ", ".join(rates) or "-",
        ",".join(f"{key}={value}" for key, value in sorted(report.labels.items())) or "-",
    )


def explain(
    subject: Annotated[str, typer.Argument(help="name of a model, or id of a request")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="decisions at most")] = 3,
    controller: ControllerOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Say why a model started where it did: options, estimates, choice, and what it took in the end."""

    async def work() -> list[controller_pb2.ExplainedDecision]:
        async with AsyncClient(controller=controller) as client:
            return list(await client.explain(subject, limit=limit))

    decisions = asyncio.run(work())
    if output is Format.json:
        print_json([as_json(decision) for decision in decisions])
        return
    if not decisions:
        console.print(f"nothing had to be decided about {subject} yet", highlight=False)
    for decision in decisions:
        _print_decision(decision)


def _print_decision(decision: controller_pb2.ExplainedDecision) -> None:
    when = time.strftime("%H:%M:%S", time.localtime(decision.unix_seconds))
    console.print(
        f"{when}  {decision.model}: {decision.choice} — {decision.reason}", highlight=False, markup=False
    )
    print_table(
        ("  OPTION", "SLOTS", "HOW", "TIER", "STOP", "WORKER", "LOAD", "TOTAL", "COST TO OTHERS"),
        (_option_row(option) for option in decision.options),
        empty="  there was no option",
    )
    if decision.outcome == "ready":
        console.print(f"  it took {_off_by(decision.measured)}", highlight=False)
        predicted = decision.options[0] if decision.options else controller_pb2.ExplainedOption()
        print_table(("  STAGE", "PREDICTED", "MEASURED"), stage_rows(predicted, decision.measured), empty="")
    elif decision.outcome:
        why = f": {decision.outcome_message}" if decision.outcome_message else ""
        console.print(f"  the start {decision.outcome}{why}", highlight=False, markup=False)


def _off_by(measured: start_pb2.StartTimings) -> str:
    took, predicted = measured.total_seconds, measured.predicted_seconds
    if not took:
        return "no time"
    off = f", {abs(predicted - took) / took:.0%} off" if predicted else ""
    return f"{format_seconds(took)}, predicted {format_seconds(predicted)}{off}"


def stage_rows(
    predicted: controller_pb2.ExplainedOption, measured: start_pb2.StartTimings
) -> list[tuple[str, ...]]:
    """Return what each stage of a start was expected to take and took; what overlaps is not a sum."""
    explained = measured.worker_seconds + max(
        measured.weights_seconds, measured.skeleton_seconds + measured.first_forward_seconds
    )
    rows = (
        ("worker", predicted.worker_seconds, measured.worker_seconds),
        ("weights", predicted.load_seconds, measured.weights_seconds),
        ("skeleton", predicted.skeleton_seconds, measured.skeleton_seconds),
        ("first forward", predicted.first_forward_seconds, measured.first_forward_seconds),
        ("the rest", predicted.overhead_seconds, max(0.0, measured.total_seconds - explained)),
        ("total", predicted.total_seconds, measured.total_seconds),
    )
    return [(f"  {name}", format_seconds(expected), format_seconds(took)) for name, expected, took in rows]


def _option_row(option: controller_pb2.ExplainedOption) -> tuple[str, ...]:
    how = option.kind.replace("_", " ")
    return (
        f"  {option.node_id}",
        ",".join(map(str, option.devices)),
        f"{how} {', '.join(option.victims)}".strip(),
        option.tier,
        format_seconds(option.stop_seconds),
        format_seconds(option.worker_seconds),
        format_seconds(option.load_seconds),
        format_seconds(option.total_seconds),
        format_seconds(option.disturbance_seconds),
    )


def drain(
    node: Annotated[str, typer.Argument(help="id of a node")], controller: ControllerOption = None
) -> None:
    """Take a node out of placement and empty it: idle replicas stop, streams move to other nodes."""
    _schedule(node, controller_pb2.NODE_SCHEDULING_DRAINED, "drained", controller)


def migrate(
    subject: Annotated[str, typer.Argument(help="name of a model, or id of a request that runs")],
    to: Annotated[str, typer.Option("--to", help="id of the node it goes to")],
    controller: ControllerOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Move a model's busiest replica, or one request, to another node; its streams go on without a gap."""

    async def work() -> controller_pb2.MigrateResponse:
        async with AsyncClient(controller=controller) as client:
            return await client.migrate(subject, to)

    moved = asyncio.run(work())
    if output is Format.json:
        print_json(as_json(moved))
        return
    streams = f"{moved.sessions} stream{'s' if moved.sessions != 1 else ''}"
    console.print(
        f"{subject}: {streams} of model {moved.model} on their way from {moved.from_node_id} to {to} "
        f"(replica {moved.replica_id}{', started for it' if moved.started else ''})",
        highlight=False,
        markup=False,
    )
    if moved.stops_source:
        console.print(f"replica {moved.from_replica_id} ends once they have left", highlight=False)


def undrain(
    node: Annotated[str, typer.Argument(help="id of a node")], controller: ControllerOption = None
) -> None:
    """Let a drained or cordoned node take replicas again."""
    _schedule(node, controller_pb2.NODE_SCHEDULING_OPEN, "open", controller)


def cordon(
    node: Annotated[str, typer.Argument(help="id of a node")], controller: ControllerOption = None
) -> None:
    """Take a node out of placement; what runs there stays."""
    _schedule(node, controller_pb2.NODE_SCHEDULING_CORDONED, "cordoned", controller)


def _schedule(
    node: str, scheduling: controller_pb2.NodeScheduling.ValueType, word: str, controller: str | None
) -> None:
    async def work() -> controller_pb2.SetNodeSchedulingResponse:
        async with AsyncClient(controller=controller) as client:
            return await client.set_node_scheduling(node, scheduling)

    done = asyncio.run(work())
    if done.absent:
        told = "no node of that id has joined (`stoker nodes` lists them); it holds for when one does"
    else:
        told = f"running there now: {format_count(done.replicas, 'replica')}"
    console.print(f"{node} is {word}; {told}", highlight=False, markup=False)


def events(
    limit: Annotated[int, typer.Option("--tail", "-n", min=1, help="past events at most")] = 100,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on as they come")] = False,
    controller: ControllerOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Print what has happened in the cluster since its controller began to lead."""

    async def work() -> None:
        async with AsyncClient(controller=controller) as client:
            async for event in client.events(limit=limit, follow=follow):
                if output is Format.json:
                    print_json(as_json(event))
                    continue
                when = time.strftime("%H:%M:%S", time.localtime(event.unix_seconds))
                fields = " ".join(f"{key}={value}" for key, value in sorted(event.fields.items()))
                console.print(f"{when}  {event.kind:<24} {fields}", highlight=False, markup=False)

    asyncio.run(work())


def top(
    interval: Annotated[float, typer.Option(min=0.2, help="seconds between looks")] = 1.0,
    controller: ControllerOption = None,
) -> None:
    """Show nodes and the busiest replicas, live, until interrupted."""

    async def work() -> None:
        async with AsyncClient(controller=controller) as client:
            with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
                while True:
                    nodes, replicas = list(await client.nodes()), list(await client.replicas())
                    live.update(live_view(nodes, replicas), refresh=True)
                    await asyncio.sleep(interval)

    asyncio.run(work())
