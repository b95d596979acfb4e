"""`stoker convert`, `inspect`, `verify`: checkpoints on this machine's disks. Needs no service."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from stoker.checkpoint.adapter import is_adapter, open_adapter
from stoker.checkpoint.content import DTYPES
from stoker.checkpoint.convert import convert
from stoker.checkpoint.index import CheckpointIndex, open_checkpoint
from stoker.checkpoint.verify import verify
from stoker.cli.output import Format, FormatOption, console, errors, print_json
from stoker.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXIT_DAMAGED = 1


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("convert")(convert_command)
    app.command("inspect")(inspect_command)
    app.command("verify")(verify_command)


def convert_command(
    src: Annotated[Path, typer.Argument(help="folder with safetensors or pickles, or a .gguf file")],
    dst: Annotated[Path, typer.Argument(help="folder to create")],
    dtype: Annotated[
        str | None, typer.Option(help=f"cast floating tensors: {', '.join(DTYPES)}; default: keep")
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="cut it for this many ranks, one file each, by its tp_plan")
    ] = 1,
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a converted checkpoint")] = False,
    output: FormatOption = Format.text,
) -> None:
    """Write a checkpoint in the layout that loads at the speed of the hardware; it stays safetensors."""
    with _progress("converting") as progress:
        index = convert(
            src, dst, dtype=dtype, tensor_parallel=tensor_parallel, overwrite=overwrite, progress=progress
        )
    if output is Format.json:
        print_json(_as_json(index))
    else:
        console.print(f"{escape(str(index.path))}: {_summary(index)}", highlight=False)


def inspect_command(
    path: Annotated[Path, typer.Argument(help="folder of a checkpoint")],
    rank: Annotated[
        int | None, typer.Option(min=0, help="of a checkpoint cut for tensor parallelism; default: the first")
    ] = None,
    *,
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor")] = False,
    output: FormatOption = Format.text,
) -> None:
    """Say what a checkpoint or an adapter holds, from its headers alone."""
    if is_adapter(path):
        _inspect_adapter(path, output)
        return
    index = open_checkpoint(path, rank=rank or 0)
    if output is Format.json:
        listed = {"tensors": [dataclasses.asdict(tensor) for tensor in index.tensors]} if tensors else {}
        print_json({**_as_json(index), **listed})
        return
    facts = index.facts
    rows = [
        ("path", str(index.path)),
        ("layout", index.layout.replace("_", " ")),
        *([("rank", f"{index.rank} of {index.ranks}")] if index.ranks > 1 else []),
        ("revision", index.revision),
        ("architecture", facts.architecture or "unknown"),
        ("context", f"{facts.context_length:,} tokens" if facts.context_length else "unknown"),
        ("vocabulary", f"{facts.vocab_size:,}" if facts.vocab_size else "unknown"),
        ("weights", f"{format_bytes(index.weight_bytes)} in {len(index.files)} file(s)"),
        ("tensors", f"{len(index.tensors):,}"),
        ("dtypes", ", ".join(f"{name} {format_bytes(size)}" for name, size in index.bytes_by_dtype.items())),
        ("tied", "; ".join(" = ".join(group) for group in index.tied_groups) or "none recorded"),
        ("small files", ", ".join(index.small_files)),
    ]
    for name, value in rows:
        console.print(f"{name:<13}{escape(value)}", highlight=False)
    for tensor in index.tensors if tensors else ():
        layer = "-" if tensor.layer is None else tensor.layer
        console.print(
            f"{escape(tensor.name)} {tensor.dtype} {escape(str(list(tensor.shape)))} layer {layer} "
            f"{tensor.file} at {tensor.offset}, {tensor.nbytes} bytes",
            highlight=False,
        )


def _inspect_adapter(path: Path, output: Format) -> None:
    adapter = open_adapter(path)
    if output is Format.json:
        print_json(
            {
                "path": str(adapter.path),
                "base_model": adapter.base_model,
                "revision": adapter.revision,
                "size_bytes": adapter.size_bytes,
                "modules": {name: dataclasses.asdict(pair) for name, pair in adapter.pairs.items()},
            }
        )
        return
    ranks = sorted({pair.rank for pair in adapter.pairs.values()})
    rows = (
        ("path", str(adapter.path)),
        ("adapter", f"LoRA of rank {', '.join(map(str, ranks))}"),
        ("base model", adapter.base_model or "not named"),
        ("revision", adapter.revision),
        ("modules", f"{len(adapter.pairs):,}: {', '.join(adapter.target_names)}"),
        ("weights", format_bytes(adapter.size_bytes)),
    )
    for name, value in rows:
        console.print(f"{name:<13}{escape(value)}", highlight=False)


def verify_command(
    path: Annotated[Path, typer.Argument(help="folder of a checkpoint")],
    output: FormatOption = Format.text,
) -> None:
    """Read a checkpoint completely and compare every digest; exit 1 where something differs."""
    with _progress("verifying") as progress:
        report = verify(path, progress)
    if output is Format.json:
        print_json({**dataclasses.asdict(report), "path": str(report.path), "ok": report.ok})
    elif not report.digests_checked:
        console.print(
            f"{escape(str(report.path))}: structure is sound; in place there are no digests to compare "
            "(`stoker convert` makes them)",
            highlight=False,
        )
    elif report.ok:
        size = format_bytes(report.bytes_checked)
        console.print(
            f"{escape(str(report.path))}: {report.chunks_checked:,} digests over {size} are right",
            highlight=False,
        )
    for bad in report.bad if output is Format.text else ():
        errors.print(
            f"[bold red]damaged:[/] {escape(bad.file)} at byte {bad.offset}, {bad.size_bytes} bytes: "
            f"expected {bad.expected}, found {escape(bad.found)}",
            highlight=False,
        )
    if not report.ok:
        raise typer.Exit(EXIT_DAMAGED)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback that moves a bar on stderr, or None where no terminal is watching."""
    if not errors.is_terminal:
        yield None
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(index: CheckpointIndex) -> str:
    dtypes = "/".join(index.bytes_by_dtype) or "empty"
    each = f", for each of {index.ranks} ranks" if index.ranks > 1 else ""
    return (
        f"{index.facts.architecture or 'unknown architecture'}, {len(index.tensors):,} tensors, "
        f"{format_bytes(index.weight_bytes)} {dtypes}{each}, revision {index.revision}"
    )


def _as_json(index: CheckpointIndex) -> dict[str, object]:
    return {
        "path": str(index.path),
        "layout": index.layout,
        "rank": index.rank,
        "ranks": index.ranks,
        "revision": index.revision,
        "facts": dataclasses.asdict(index.facts),
        "weight_bytes": index.weight_bytes,
        "tensor_bytes": index.tensor_bytes,
        "tensor_count": len(index.tensors),
        "bytes_by_dtype": index.bytes_by_dtype,
        "chunk_bytes": index.chunk_bytes,
        "files": [{"name": file.name, "size_bytes": file.size_bytes} for file in index.files],
        "tied_groups": index.tied_groups,
        "small_files": index.small_files,
    }
