"""`stoker doctor`: what this host offers for fast loading, and what to change."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stoker.cli.host_probe import Finding, Level, probe_host
from stoker.cli.output import Format, FormatOption, console, print_json
from stoker.client.connection import data_home, local_cluster

MARKS = {Level.good: "[green]ok  [/]", Level.advice: "[yellow]hint[/]", Level.bad: "[red]bad [/]"}


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(doctor)


def doctor(
    data: Annotated[Path | None, typer.Option("--data", help="folder to try direct I/O in")] = None,
    etcd: Annotated[str, typer.Option(help="host:port of an etcd member to try")] = "",
    store: Annotated[str, typer.Option(help="host:port of this host's store; default: of `stoker up`")] = "",
    output: FormatOption = Format.text,
) -> None:
    """Say what this host offers (direct I/O, huge pages, memory lock, GPUs, etcd) and what to change.

    Exits with 1 when something keeps Stoker from running at all.
    """
    running = local_cluster(data)
    findings = probe_host(
        data or data_home(),
        etcd_address=etcd,
        store_address=store or ("" if running is None else running.store),
    )
    if output is Format.json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            _print(finding)
    if any(finding.level is Level.bad for finding in findings):
        raise typer.Exit(1)


def _print(finding: Finding) -> None:
    console.print(f"{MARKS[finding.level]} {finding.subject:<16} {finding.found}", highlight=False)
    if finding.advice:
        console.print(f"     {'':<16} → {finding.advice}", highlight=False, style="dim")
