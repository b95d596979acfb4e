"""`stoker pull`, `stoker cache ls|pin|unpin|evict|verify`: copies of remote checkpoints on a store's disk."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, TypeVar

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

from stoker import rpc
from stoker.cli.output import Format, FormatOption, as_json, console, errors, print_json, print_table
from stoker.client.connection import find_store
from stoker.units import format_bytes
from stoker.v1 import checkpoint_store_pb2 as pb
from stoker.v1 import checkpoint_store_pb2_grpc

StoreOption = Annotated[
    str | None, typer.Option("--store", help="host:port; default $STOKER_STORE, then `stoker up`")
]
UriArgument = Annotated[str, typer.Argument(help="where the checkpoint comes from, e.g. s3://bucket/model")]
EXIT_DAMAGED = 1
VERIFY_SECONDS = 3600.0
"""A copy of a terabyte on a slow disk."""

Answer = TypeVar("Answer")

cache_app = typer.Typer(help="Copies of remote checkpoints on a store's disk.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("pull")(pull)
    app.add_typer(cache_app, name="cache")


def pull(
    uri: UriArgument,
    revision: Annotated[str, typer.Option(help="refuse any other; default: what the origin has now")] = "",
    store: StoreOption = None,
    output: FormatOption = Format.text,
) -> None:
    """Bring a remote checkpoint to the store's disk and return when all of it is there."""
    last = asyncio.run(_pull(uri, revision, store))
    if output is Format.json:
        print_json(as_json(last))
        return
    moved = ", ".join(f"{format_bytes(each.bytes)} from {each.tier}" for each in last.transfers)
    console.print(
        f"{escape(uri)}: {format_bytes(last.total_bytes)} on disk ({moved or 'all was there'})",
        highlight=False,
    )


async def _pull(uri: str, revision: str, store: str | None) -> pb.PullProgress:
    last = pb.PullProgress()
    async with _stub(store) as stub:
        with transfer_bar("pulling") as progress:
            async for last in stub.Pull(pb.PullRequest(uri=uri, revision=revision)):
                progress(last.disk_bytes, last.total_bytes)
    return last


@cache_app.command("ls")
def list_copies(store: StoreOption = None, output: FormatOption = Format.text) -> None:
    """List what the disk cache holds, the least recently used first."""
    found: pb.ListCopiesResponse = _ask(store, lambda stub: stub.ListCopies(pb.ListCopiesRequest()))
    if output is Format.json:
        print_json(as_json(found))
        return
    print_table(
        ("CHECKPOINT", "REVISION", "ON DISK", "SIZE", "STATE", "LAST USED"),
        (
            (
                copy.uri,
                copy.revision[:12],
                format_bytes(copy.disk_bytes),
                format_bytes(copy.total_bytes),
                _state(copy),
                dt.datetime.fromtimestamp(copy.last_used_unix_seconds, dt.UTC).isoformat(" ", "seconds"),
            )
            for copy in found.copies
        ),
        empty=f"no copies in {found.folder}"
        if found.folder
        else "this store has no disk cache; set STOKER_STORE_CACHE_DIR",
    )


@cache_app.command()
def pin(uri: UriArgument, store: StoreOption = None) -> None:
    """Keep a copy whatever else needs room."""
    _ask(store, lambda stub: stub.PinCopy(pb.PinCopyRequest(uri=uri, pinned=True)))
    console.print(f"pinned {escape(uri)}", highlight=False)


@cache_app.command()
def unpin(uri: UriArgument, store: StoreOption = None) -> None:
    """Let a copy go when room is needed."""
    _ask(store, lambda stub: stub.PinCopy(pb.PinCopyRequest(uri=uri, pinned=False)))
    console.print(f"unpinned {escape(uri)}", highlight=False)


@cache_app.command()
def evict(uri: UriArgument, store: StoreOption = None) -> None:
    """Delete the copies of a checkpoint."""
    answer: pb.EvictCopyResponse = _ask(store, lambda stub: stub.EvictCopy(pb.EvictCopyRequest(uri=uri)))
    freed = answer.freed_bytes
    console.print(f"evicted {escape(uri)}: {format_bytes(freed)} are free", highlight=False)


@cache_app.command()
def verify(uri: UriArgument, store: StoreOption = None, output: FormatOption = Format.text) -> None:
    """Read a copy completely and compare its digests; exit 1 where something differs."""
    request = pb.VerifyCopyRequest(uri=uri)
    found: pb.VerifyCopyResponse = _ask(store, lambda stub: stub.VerifyCopy(request, timeout=VERIFY_SECONDS))
    if output is Format.json:
        print_json(as_json(found))
    elif not found.digests_checked:
        console.print(f"{escape(uri)}: structure is sound; it has no digests to compare", highlight=False)
    elif not found.damaged:
        size = format_bytes(found.checked_bytes)
        console.print(f"{escape(uri)}: the digests over {size} are right", highlight=False)
    for part in found.damaged if output is Format.text else ():
        errors.print(
            f"[bold red]damaged:[/] {escape(part.file)} at byte {part.offset}, {part.bytes} bytes: "
            f"{escape(part.reason)}; fetched again at the next use",
            highlight=False,
        )
    if found.damaged:
        raise typer.Exit(EXIT_DAMAGED)


def _state(copy: pb.Copy) -> str:
    states = {
        "whole": copy.whole,
        "under way": not copy.whole,
        "pinned": copy.pinned,
        "in use": copy.in_use,
        "superseded": copy.superseded,
    }
    return ", ".join(name for name, holds in states.items() if holds)


@contextmanager
def transfer_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told bytes done and in all: a bar with rate and time left, on a terminal's stderr."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@asynccontextmanager
async def _stub(store: str | None) -> AsyncIterator[Any]:
    address = find_store(store)
    channel = rpc.connect(address)
    try:
        with rpc.translated(f"store {address}"):
            yield checkpoint_store_pb2_grpc.CheckpointStoreStub(channel)
    finally:
        await channel.close()


def _ask(store: str | None, call: Callable[[Any], Awaitable[Answer]]) -> Answer:
    async def work() -> Answer:
        async with _stub(store) as stub:
            return await call(stub)

    return asyncio.run(work())
