"""Small files: tokenizers and templates, fetched from a store once per revision, cached on disk and memory.

Single flight per revision; a fetch belongs to the gateway, not to the request that wanted it first. Files on
disk are written to a temporary folder and renamed, so that a folder that exists is whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from concurrent.futures import Executor
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from services.gateway.routing.routes import ModelRoute
from services.gateway.text.model_text import ModelText
from stoker import log, rpc
from stoker.errors import CheckpointInvalid, PeerError, StokerError
from stoker.ids import new_id
from stoker.units import MIB
from stoker.v1 import checkpoint_store_pb2, checkpoint_store_pb2_grpc

MAX_MODEL_BYTES = 128 * MIB
"""Small files of one model, together."""

FETCH_SECONDS = 30.0
"""Deadline of a fetch from one store."""

Key = tuple[str, str]


class Starter(Protocol):
    """Runs background work that ends with the gateway."""

    def __call__(self, work: Coroutine[Any, Any, None], *, name: str) -> object:
        """Start it."""
        ...


class ModelTexts:
    """The text sides of the models in the routes.

    Args:
        cache_dir: Folder of cached files.
        disk_bytes: Most bytes kept there.
        models: Most models kept in memory.
        executor: Threads for parsing and disk.
        start: Starts background work.
    """

    def __init__(
        self, *, cache_dir: Path, disk_bytes: int, models: int, executor: Executor, start: Starter
    ) -> None:
        self._cache_dir = cache_dir
        self._disk_bytes = disk_bytes
        self._models = models
        self._executor = executor
        self._start = start
        self._ready: OrderedDict[Key, ModelText] = OrderedDict()
        self._loading: dict[Key, asyncio.Future[ModelText]] = {}

    def cached(self, route: ModelRoute) -> ModelText | None:
        """Return a model's text side if it is in memory."""
        key = (route.checkpoint_uri, route.revision)
        text = self._ready.get(key)
        if text is not None:
            self._ready.move_to_end(key)
        return text

    def prefetch(self, route: ModelRoute) -> None:
        """Begin to get a model's text side unless it is here or on its way; a use tries again what failed."""
        if route.store_addresses and self.cached(route) is None:
            self._load(route)

    async def get(self, route: ModelRoute) -> ModelText:
        """Return a model's text side, fetching it if need be.

        Raises:
            CheckpointInvalid: The files are no tokenizer this gateway can use.
            PeerError: No store could give them.
        """
        cached = self.cached(route)
        return cached if cached is not None else await asyncio.shield(self._load(route))

    def _load(self, route: ModelRoute) -> asyncio.Future[ModelText]:
        key = (route.checkpoint_uri, route.revision)
        if key not in self._loading:
            future = self._loading[key] = asyncio.get_running_loop().create_future()
            self._start(self._load_into(future, key, route), name=f"small files of {route.name}")
        return self._loading[key]

    async def _load_into(self, future: asyncio.Future[ModelText], key: Key, route: ModelRoute) -> None:
        try:
            text = await self._build(key, route)
        except asyncio.CancelledError:
            future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of this task: whoever waits gets the error
            unforeseen = None if isinstance(error, StokerError) else error
            log.get().warning("small_files.failed", model=route.name, reason=repr(error), exc_info=unforeseen)
            future.set_exception(error)
            future.exception()  # seen: a prefetch has nobody who waits
        else:
            self._ready[key] = text
            while len(self._ready) > self._models:
                self._ready.popitem(last=False)
            future.set_result(text)
        finally:
            del self._loading[key]

    async def _build(self, key: Key, route: ModelRoute) -> ModelText:
        loop = asyncio.get_running_loop()
        folder = self._cache_dir / hashlib.sha256("\0".join(key).encode()).hexdigest()[:32]
        files = await loop.run_in_executor(self._executor, _read_folder, folder) if route.revision else None
        if files is None:
            files = await _fetch(route)
            if route.revision:
                await loop.run_in_executor(self._executor, write_folder, folder, files, self._disk_bytes)
        return await loop.run_in_executor(self._executor, ModelText, files)


async def _fetch(route: ModelRoute) -> dict[str, bytes]:
    last: StokerError | None = None
    for address in route.store_addresses:
        try:
            return await _fetch_from(address, route)
        except StokerError as error:
            last = error
    raise last or PeerError(
        f"no store can give the tokenizer of model {route.name!r} now; try again shortly",
        retry_after_seconds=2.0,
    )


async def _fetch_from(address: str, route: ModelRoute) -> dict[str, bytes]:
    parts: dict[str, list[bytes]] = {}
    total_bytes = 0
    channel = rpc.connect(address)
    try:
        with rpc.translated(f"store {address}"):
            stub = checkpoint_store_pb2_grpc.CheckpointStoreStub(channel)
            request = checkpoint_store_pb2.ReadSmallFilesRequest(
                uri=route.checkpoint_uri, revision=route.revision
            )
            async for part in stub.ReadSmallFiles(request, timeout=FETCH_SECONDS):
                total_bytes += len(part.content)
                if total_bytes > MAX_MODEL_BYTES:
                    raise CheckpointInvalid(
                        f"the small files of model {route.name!r} are larger than {MAX_MODEL_BYTES} bytes"
                    )
                parts.setdefault(part.name, []).append(part.content)
    finally:
        await channel.close()
    return {name: b"".join(contents) for name, contents in parts.items()}


def _read_folder(folder: Path) -> dict[str, bytes] | None:
    try:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        os.utime(folder)  # the folder's time says when it was last used
    except OSError:
        return None
    return files or None


def write_folder(folder: Path, files: Mapping[str, bytes], limit_bytes: int) -> None:
    """Write a model's files as one folder, then drop the least recently used folders beyond the limit.

    A cache that cannot be written is only slower: it is logged and goes on.
    """
    temporary = folder.with_name(new_id("tmp"))
    try:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            if PurePosixPath(name).name == name:  # a cache entry is flat; nested files are of no use here
                (temporary / name).write_bytes(content)
        temporary.rename(folder)
        _evict(folder.parent, keep=folder, limit_bytes=limit_bytes)
    except OSError as error:
        log.get().warning("small_files.cache_unwritable", folder=str(folder), reason=str(error))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _evict(cache_dir: Path, *, keep: Path, limit_bytes: int) -> None:
    folders = sorted(cache_dir.iterdir(), key=lambda folder: folder.stat().st_mtime)
    sizes = {folder: sum(path.stat().st_size for path in folder.iterdir()) for folder in folders}
    total_bytes = sum(sizes.values())
    for folder in folders:
        if total_bytes <= limit_bytes:
            return
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            total_bytes -= sizes[folder]
