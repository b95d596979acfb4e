"""`stoker deploy`, `rm`, `ls`, `schema`: what is deployed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn

from stoker.checkpoint.folder import hub_hint
from stoker.cli.apply import apply
from stoker.cli.model_file import Wanted, read_models
from stoker.cli.output import Format, FormatOption, as_json, console, errors, print_json, print_table
from stoker.client import AsyncClient
from stoker.errors import DeadlineExceeded, InvalidRequest, NotFound
from stoker.units import format_bytes
from stoker.v1 import controller_pb2, model_pb2

ControllerOption = Annotated[
    str | None, typer.Option("--controller", help="host:port; default $STOKER_CONTROLLER, then `stoker up`")
]

KEEP_FOREVER = "forever"
KEEP_AUTO = "auto"
SCHEMA_PATH = Path(__file__).with_name("models.schema.json")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command()(deploy)
    app.command("rm")(remove)
    app.command("ls")(list_models)
    app.command()(schema)


def deploy(
    name: Annotated[str, typer.Argument(help="what clients ask for")] = "",
    checkpoint: Annotated[
        str, typer.Argument(help="folder of a checkpoint, as every node sees it, or a URI")
    ] = "",
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="deploy what a YAML file lists; see `stoker schema`")
    ] = None,
    keep_alive: Annotated[
        str,
        typer.Option(
            help=f"seconds an unused replica lives, '{KEEP_FOREVER}', '{KEEP_AUTO}' (from the model's own "
            f"arrivals) or '{KEEP_AUTO}:SECONDS' (at most so long); default 300"
        ),
    ] = "",
    min_replicas: Annotated[int, typer.Option("--min", min=0, help="kept even when nobody asks")] = 0,
    max_replicas: Annotated[int, typer.Option("--max", min=0, help="at most; 0 = default (1)")] = 0,
    concurrency: Annotated[int, typer.Option(min=0, help="sessions per replica; 0 = default (8)")] = 0,
    max_context: Annotated[int, typer.Option(min=0, help="tokens; 0 = the model's own limit")] = 0,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", help="NAME=FOLDER or NAME=URI of a LoRA adapter, asked for as MODEL:NAME; repeatable"
        ),
    ] = None,
    devices: Annotated[int, typer.Option(min=0, help="device slots per replica; 0 = as it is cut")] = 0,
    require: Annotated[
        list[str] | None, typer.Option("--require", help="KEY=VALUE that a node must carry; repeatable")
    ] = None,
    prefer: Annotated[
        list[str] | None, typer.Option("--prefer", help="KEY=VALUE that a node should carry; repeatable")
    ] = None,
    *,
    pinned: Annotated[bool, typer.Option("--pinned", help="never stopped or moved for other models")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="with -f: delete models not in the file")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show what would change, change nothing")
    ] = False,
    create_only: Annotated[bool, typer.Option(help="refuse when the model exists")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="start a replica and return when it is ready")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds --wait waits at most")] = 300.0,
    controller: ControllerOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Deploy a model, or change one that is deployed; or all that a file lists."""
    if file is not None:
        if name or checkpoint or wait or create_only:
            raise InvalidRequest("-f FILE says everything: give no NAME, CHECKPOINT, --wait or --create-only")
        asyncio.run(_apply(read_models(file), controller, prune=prune, dry_run=dry_run, output=output))
        return
    _check_named(name, checkpoint, prune=prune)
    spec = model_pb2.ModelSpec(
        name=name,
        checkpoint_uri=checkpoint_uri(checkpoint),
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        concurrency=concurrency,
        max_context_tokens=max_context,
        adapters=[_adapter(text) for text in adapter or ()],
    )
    spec.devices, spec.pinned = devices, pinned
    spec.required_node_labels.update(_labels("--require", require))
    spec.preferred_node_labels.update(_labels("--prefer", prefer))
    _set_keep_alive(spec, keep_alive)
    if dry_run:
        wanted = (Wanted(spec=spec, where=name),)
        asyncio.run(_apply(wanted, controller, prune=False, dry_run=True, output=output))
        return
    answer = asyncio.run(_deploy(spec, controller, timeout if wait else None, create_only=create_only))
    _print_deployed(answer, output)


def _check_named(name: str, checkpoint: str, *, prune: bool) -> None:
    """Refuse what does not name one model."""
    if not name or not checkpoint:
        raise InvalidRequest("give NAME and CHECKPOINT, or -f FILE")
    if prune:
        raise InvalidRequest("--prune deletes what a file does not list: give -f FILE")


def _print_deployed(answer: controller_pb2.DeployResponse, output: Format) -> None:
    if output is Format.json:
        print_json(as_json(answer))
        return
    name = answer.model.spec.name
    verb = "deployed" if answer.created else "changed" if answer.changed else "unchanged:"
    info = answer.model.checkpoint
    size = f"{info.architecture}, {format_bytes(info.weight_bytes)} {info.dtype}"
    console.print(f"{verb} {name} ({size})", highlight=False)
    for each in answer.model.spec.adapters:
        what = f"{format_bytes(each.file_bytes)}, rank {each.rank}: {', '.join(each.target_modules)}"
        console.print(f"  {name}:{each.name} ({what})", highlight=False)


async def _apply(
    wanted: Sequence[Wanted], controller: str | None, *, prune: bool, dry_run: bool, output: Format
) -> None:
    async with AsyncClient(controller=controller) as client:
        await apply(client, wanted, prune=prune, dry_run=dry_run, as_json=output is Format.json)


async def _deploy(
    spec: model_pb2.ModelSpec, controller: str | None, wait_seconds: float | None, *, create_only: bool
) -> controller_pb2.DeployResponse:
    async with AsyncClient(controller=controller) as client:
        answer = await client.deploy(spec, create_only=create_only)
        if wait_seconds is not None:
            await wait_until_ready(client, spec.name, wait_seconds)
        return answer


async def wait_until_ready(client: AsyncClient, model: str, timeout_seconds: float) -> None:
    """Start a replica of `model` and show its progress on a terminal; returns when it is ready."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task(f"starting {model}", total=1.0)
        async for event in client.acquire(model, timeout_seconds=timeout_seconds):
            match event.WhichOneof("event"):
                case "queued":
                    progress.update(task, description=f"{model} waits: {event.queued.reason}")
                case "starting":
                    progress.update(
                        task,
                        description=f"{model} starts on {event.starting.node_id}",
                        completed=event.starting.loaded_fraction,
                    )
                case "ready":
                    return
    raise DeadlineExceeded(f"{model} was not ready within {timeout_seconds:g} s; see `stoker ps`")


def remove(
    names: Annotated[list[str], typer.Argument(help="models to delete")],
    controller: ControllerOption = None,
) -> None:
    """Delete models; their replicas are drained and stopped. Checkpoints stay."""

    async def work() -> None:
        async with AsyncClient(controller=controller) as client:
            for name in names:
                await client.delete(name)
                console.print(f"deleted {name}", highlight=False)

    asyncio.run(work())


def list_models(controller: ControllerOption = None, output: FormatOption = Format.text) -> None:
    """List the deployed models."""

    async def work() -> list[model_pb2.Model]:
        async with AsyncClient(controller=controller) as client:
            return list(await client.models())

    models = asyncio.run(work())
    if output is Format.json:
        print_json([as_json(model) for model in models])
        return
    print_table(
        ("MODEL", "STATE", "READY", "SIZE", "ARCHITECTURE", "CHECKPOINT", "MESSAGE"),
        (
            (
                model.spec.name,
                model_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower(),
                f"{model.ready_replicas}/{model.spec.max_replicas}",
                format_bytes(model.checkpoint.weight_bytes),
                model.checkpoint.architecture,
                model.spec.checkpoint_uri,
                model.message,
            )
            for model in models
        ),
        empty="no models; deploy one: stoker deploy NAME FOLDER",
    )


def checkpoint_uri(checkpoint: str) -> str:
    """Return a local folder made absolute; anything with a scheme is left alone.

    Raises:
        NotFound: There is no such folder, and it has the form of a name on the hub.
    """
    if "://" in checkpoint:
        return checkpoint
    folder = Path(checkpoint).expanduser()
    if not folder.exists() and (hint := hub_hint(checkpoint)):
        raise NotFound(f"there is no folder {checkpoint} here: give the folder of a checkpoint{hint}")
    return str(folder.resolve()) if folder.exists() or not folder.is_absolute() else str(folder)


def _adapter(text: str) -> model_pb2.AdapterSpec:
    name, mark, folder = text.partition("=")
    if not (mark and name and folder):
        raise InvalidRequest(
            f"--adapter {text!r}: give NAME=FOLDER or NAME=URI, e.g. poet=/adapters/poet, poet=hf://owner/poet"
        )
    return model_pb2.AdapterSpec(name=name, uri=checkpoint_uri(folder))


def schema() -> None:
    """Print the JSON schema of the files that `stoker deploy -f` takes."""
    sys.stdout.write(SCHEMA_PATH.read_text(encoding="utf-8"))


def _labels(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    labels: dict[str, str] = {}
    for text in texts or ():
        key, mark, value = text.partition("=")
        if not (mark and key):
            raise InvalidRequest(f"{option} {text!r}: give KEY=VALUE, e.g. gpu=a100")
        if key in labels:
            raise InvalidRequest(f"{option}: {key} is given twice, {labels[key]!r} and {value!r}")
        labels[key] = value
    return labels


def _set_keep_alive(spec: model_pb2.ModelSpec, text: str) -> None:
    kind, _, longest = text.partition(":")
    spec.keep_alive_auto = kind == KEEP_AUTO
    seconds = longest if spec.keep_alive_auto else text
    if seconds:
        spec.keep_alive_seconds = _keep_alive_seconds(seconds)


def _keep_alive_seconds(text: str) -> float:
    if text == KEEP_FOREVER:
        return -1.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidRequest(
            f"--keep-alive {text!r}: give seconds (0 = stop at once), '{KEEP_FOREVER}' or '{KEEP_AUTO}'"
        )
    return seconds
