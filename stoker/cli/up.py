"""`stoker up` and `stoker down`: every service of a one-host cluster, as one command."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from stoker.cli.local_cluster import ClusterOptions, run_cluster
from stoker.cli.models import checkpoint_uri
from stoker.cli.output import Format, FormatOption, console, errors, print_json
from stoker.client.connection import LocalCluster, data_home, local_cluster
from stoker.errors import ConfigError, NotFound
from stoker.units import MB

READY_FD_VARIABLE = "STOKER_UP_READY_FD"
DETACHED_READY_SECONDS = 120.0
STOP_SECONDS = 60.0
MAX_NODES = 64
"""Each is two processes and one worker for every replica."""


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(up)
    app.command()(down)


def up(
    data: Annotated[
        Path | None, typer.Option("--data", help="state, logs and caches; default $STOKER_HOME or XDG")
    ] = None,
    host: Annotated[str, typer.Option(help="address the REST and gRPC faces listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="REST port; 0 = any free one")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0 = any free one")] = 8001,
    nodes: Annotated[
        int, typer.Option(min=1, max=MAX_NODES, help="nodes on this host, an agent and a store each")
    ] = 1,
    devices: Annotated[
        int | None, typer.Option(min=1, max=1024, help="declared devices of each node, instead of GPUs")
    ] = None,
    disk_bandwidth: Annotated[
        float, typer.Option(min=0, help="MB/s that each node's disk is slowed to; 0 = not at all")
    ] = 0.0,
    network_bandwidth: Annotated[
        float,
        typer.Option(min=0, help="MB/s that each node's peers and origins are slowed to; 0 = not at all"),
    ] = 0.0,
    cpu_slots: Annotated[int, typer.Option(min=1, help="replicas at once on a host without GPUs")] = 2,
    pool: Annotated[
        float, typer.Option(min=0, help="GiB of each node's memory for checkpoints; 0 = automatic")
    ] = 0.0,
    deploy: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER, deployed at once; repeatable")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="SERVICE.SETTING=VALUE, e.g. controller.may_migrate=true; repeatable"),
    ] = None,
    *,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="go on in the background")] = False,
    output: FormatOption = Format.text,
) -> None:
    """Run gateway, controller, node agents and stores on this host until Ctrl-C (or `stoker down`)."""
    options = ClusterOptions(
        data_dir=(data or data_home()).expanduser().resolve(),
        host=host,
        rest_port=port,
        grpc_port=grpc_port,
        node_count=nodes,
        devices=devices,
        cpu_slots=cpu_slots,
        pool_bytes=int(pool * 2**30),
        disk_bytes_per_second=disk_bandwidth * MB,
        network_bytes_per_second=network_bandwidth * MB,
        deploy=tuple(_name_and_folder(item) for item in deploy or ()),
        settings=tuple(_setting(item) for item in settings or ()),
    )
    if detach:
        _print_running(_start_detached(options.data_dir), options.deploy, output)
        return

    def ready(cluster: LocalCluster) -> None:
        descriptor = os.environ.get(READY_FD_VARIABLE)
        if descriptor:
            os.write(int(descriptor), b"ready\n")
            os.close(int(descriptor))
        else:
            _print_running(cluster, options.deploy, output)

    asyncio.run(_until_stopped(options, ready))


async def _until_stopped(options: ClusterOptions, ready: Callable[[LocalCluster], None]) -> None:
    """Run the cluster; SIGTERM, SIGHUP and Ctrl-C all end it in order."""
    work = asyncio.current_task()
    assert work is not None  # noqa: S101 - for the type checker: a coroutine run by asyncio.run has a task
    loop = asyncio.get_running_loop()
    for caught in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        loop.add_signal_handler(caught, work.cancel)
    try:
        await run_cluster(options, ready)
    except asyncio.CancelledError:
        errors.print("stopped", highlight=False, style="dim")


def down(
    data: Annotated[
        Path | None, typer.Option("--data", help="data folder of the running `stoker up`")
    ] = None,
) -> None:
    """Stop what `stoker up` runs on this host; returns when everything has ended."""
    data_dir = (data or data_home()).expanduser().resolve()
    cluster = local_cluster(data_dir)
    if cluster is None:
        raise NotFound(f"nothing runs from {data_dir}; give the folder of `stoker up` with --data")
    descriptor = os.pidfd_open(cluster.pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        if not _wait_for_exit(descriptor, STOP_SECONDS):
            raise ConfigError(
                f"`stoker up` (pid {cluster.pid}) has not ended after {STOP_SECONDS:g} s; see its logs"
            )
    finally:
        os.close(descriptor)
    console.print("stopped", highlight=False)


def _wait_for_exit(pidfd: int, timeout_seconds: float) -> bool:
    import select  # noqa: PLC0415 - only `down` needs it

    readable, _, _ = select.select([pidfd], [], [], timeout_seconds)
    return bool(readable)


def _start_detached(data_dir: Path) -> LocalCluster:
    """Run this same command without --detach in a session of its own; return when it is ready."""
    logs = data_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    arguments = [item for item in sys.argv[1:] if item not in ("--detach", "-d")]
    reader, writer = os.pipe()
    log_path = logs / "up.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "stoker.cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(writer,),
            env=os.environ | {READY_FD_VARIABLE: str(writer)},
        )
    os.close(writer)
    with os.fdopen(reader, "rb") as signals:
        ready = signals.readline() == b"ready\n"  # end of file when it ended before
    cluster = local_cluster(data_dir)
    if not ready or cluster is None:
        process.wait(DETACHED_READY_SECONDS)
        raise ConfigError(log_path.read_text(errors="replace").strip().removeprefix("error: "))
    return cluster


def _print_running(cluster: LocalCluster, deployed: tuple[tuple[str, str], ...], output: Format) -> None:
    if output is Format.json:
        print_json(
            {
                "pid": cluster.pid,
                "rest_url": cluster.rest_url,
                "grpc": cluster.gateway,
                "controller": cluster.controller,
                "attach_socket": cluster.attach_socket,
            }
        )
        return
    model = deployed[0][0] if deployed else "MODEL"
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}], "stream": true}}'
    lines = [
        f"REST        {cluster.rest_url}/v1   (OpenAI's protocol)",
        f"docs        {cluster.rest_url}/docs",
        f"gRPC        {cluster.gateway}",
        f"controller  {cluster.controller}",
        f"library     export STOKER_ATTACH_SOCKET={shlex.quote(cluster.attach_socket)}",
        "",
        f"curl -N {cluster.rest_url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
    ]
    if not deployed:
        lines.insert(6, "deploy a model first: stoker deploy MODEL FOLDER")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _setting(item: str) -> tuple[str, str, str]:
    name, separator, value = item.partition("=")
    service, dot, setting = name.strip().partition(".")
    if not (separator and service and dot and setting):
        raise ConfigError(f"--set {item!r}: give SERVICE.SETTING=VALUE, e.g. controller.may_migrate=true")
    return service, setting, value


def _name_and_folder(item: str) -> tuple[str, str]:
    name, separator, folder = item.partition("=")
    if not (name and separator and folder):
        raise ConfigError(f"--deploy {item!r}: give NAME=FOLDER")
    return name, checkpoint_uri(folder)
