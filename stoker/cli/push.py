"""`stoker push`: upload a checkpoint's folder to an object store or a shared folder. Needs no service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from stoker.checkpoint.adapter import adapter_index, is_adapter
from stoker.checkpoint.index import CheckpointIndex, open_checkpoint
from stoker.checkpoint.layout import ADAPTER_CONFIG_NAME, CONFIG_NAME, MANIFEST_NAME, SHARD_INDEX_NAME
from stoker.cli.cache import transfer_bar
from stoker.cli.output import Format, FormatOption, console, print_json
from stoker.errors import AlreadyExists, ConfigError, InvalidRequest, PeerError
from stoker.loader.sources import local_folder
from stoker.object_stores import import_obstore, reason_of
from stoker.units import MIB, format_bytes

SCHEMES = ("s3://", "gs://", "az://", "file://")
PART_BYTES = 16 * MIB
"""Of a multipart upload; obstore has a bounded number of them in flight."""


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("push")(push_command)


def push_command(
    folder: Annotated[Path, typer.Argument(help="folder of a checkpoint or of a LoRA adapter")],
    uri: Annotated[str, typer.Argument(help=f"where to: {', '.join(SCHEMES)} or a path")],
    *,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a checkpoint that is there")
    ] = False,
    output: FormatOption = Format.text,
) -> None:
    """Upload a checkpoint or an adapter; what makes it whole goes last. The environment holds credentials."""
    index = adapter_index(folder) if is_adapter(folder) else open_checkpoint(folder)
    with transfer_bar("pushing") as progress:
        pushed = push(index, uri, overwrite=overwrite, progress=progress)
    if output is Format.json:
        print_json(
            {"uri": uri, "revision": index.revision, "files": len(pushed), "bytes": sum(pushed.values())}
        )
        return
    size = format_bytes(sum(pushed.values()))
    console.print(f"{escape(uri)}: {len(pushed)} files, {size}, revision {index.revision}", highlight=False)


def push(
    index: CheckpointIndex, uri: str, *, overwrite: bool, progress: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Upload a checkpoint and return the bytes of each file sent; blocks.

    A checkpoint that is replaced is taken apart first, so that old and new are never believed together.

    Args:
        index: Of the checkpoint.
        uri: Of the folder to fill.
        overwrite: Whether to replace what is there.
        progress: Called with the bytes sent and the bytes to send.

    Raises:
        InvalidRequest: The uri is of no kind that can be pushed to.
        AlreadyExists: There is a checkpoint and it was not to be replaced.
        PeerError: The store refuses or fails; nothing that looks complete is left behind.
    """
    obstore, store = _open(uri)
    sizes = {name: (index.path / name).stat().st_size for name in _names(index)}
    total_bytes, done_bytes = sum(sizes.values()), 0
    marks = (MANIFEST_NAME, CONFIG_NAME, ADAPTER_CONFIG_NAME)
    try:
        there = {meta["path"].rpartition("/")[2] for meta in obstore.list_with_delimiter(store)["objects"]}
        if there.intersection(marks):
            if not overwrite:
                raise AlreadyExists(
                    f"{uri} holds a checkpoint or an adapter already; replace it with --overwrite"
                )
            obstore.delete(store, [name for name in marks if name in there])
        for name in sizes:
            for piece_bytes in _sent(obstore, store, index.path / name, name):
                done_bytes += piece_bytes
                if progress is not None:
                    progress(done_bytes, total_bytes)
    except (obstore.exceptions.BaseError, OSError) as error:
        raise PeerError(
            f"{uri} is not complete: {reason_of(error)}; push again when that is mended (an object store's "
            "address and credentials come from the environment)"
        ) from error
    return sizes


def _names(index: CheckpointIndex) -> list[str]:
    """Return the files to send: weights first, and last what makes the folder a checkpoint."""
    converted = index.layout == "converted"
    listing = not converted and (index.path / SHARD_INDEX_NAME).is_file()
    last = ADAPTER_CONFIG_NAME if index.layout == "adapter" else CONFIG_NAME
    small = [name for name in index.small_files if name != last]
    weights = [file.name for file in index.files]
    return [
        *weights,
        *small,
        *([SHARD_INDEX_NAME] if listing else []),
        last,
        *([MANIFEST_NAME] if converted else []),
    ]


def _sent(obstore: Any, store: Any, path: Path, name: str) -> Iterator[int]:
    """Upload a file, yielding the bytes of each piece once the store has taken it."""
    size = path.stat().st_size
    if size <= PART_BYTES:
        obstore.put(store, name, path.read_bytes())
        yield size
        return
    with path.open("rb") as file, obstore.open_writer(store, name, buffer_size=PART_BYTES) as writer:
        while piece := file.read(PART_BYTES):
            writer.write(piece)
            yield len(piece)


def _open(uri: str) -> tuple[Any, Any]:
    """Return obstore, and its store for the folder at `uri`, which is made where it is one of this host."""
    if "://" in uri and not uri.startswith(SCHEMES):
        raise InvalidRequest(
            f"{uri}: can push to {', '.join(SCHEMES)} or a path; for the hub use `hf upload`"
        )
    obstore = import_obstore()
    folder = local_folder(uri)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(
                f"{folder} cannot be filled: {error.strerror or error}; give a folder that you may write"
            ) from error
        uri = folder.resolve().as_uri()
    try:
        return obstore, obstore.store.from_url(uri)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise ConfigError(f"{uri} cannot be opened: {reason_of(error)}; check the environment") from error
