"""Remote checkpoints brought to the disk cache without passing through the pool.

A pull has its own few threads and buffers, so that it takes neither chunks from models nor the far lane from
loads. Whoever asks for the same checkpoint meanwhile joins it, and stores that pull it at the same time share
the work as loads do: what has landed here is sent to them from the disk. A load of the same checkpoint goes
first and takes over what other stores are told: the pull ends the runs it has begun, waits until the load is
done and fetches what is still missing then, so the origin is read once.
"""

from __future__ import annotations

import asyncio
import mmap
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field

from services.store import metrics
from services.store.catalog import Catalog, CatalogEntry
from services.store.chain import GaveWay, run_chunks
from services.store.disk_cache.partial import PartialCheckpoint
from services.store.far_weights import OpenedFile
from services.store.loads import Loads
from services.store.reading.bandwidth import Moved, moved_by_tier
from services.store.reading.chunk_source import ChunkSource, fill_run
from services.store.reading.pace import Pace
from services.store.remote.checkpoint import RemoteCheckpoint
from services.store.sharing import Sharing
from stoker import log
from stoker.checkpoint.index import CheckpointFile
from stoker.checkpoint.reading import ReadPart
from stoker.clock import Clock
from stoker.errors import DiskFull, InvalidRequest, LoadFailed, PeerError, StokerError

THREADS = 4
"""Ranges in flight of one pull; each holds a buffer of one run of chunks."""

BATCH_RUNS = 32
"""Runs between two looks at whether a load wants the same checkpoint."""

MAX_PULLS = 8
PROGRESS_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring chunks of one file."""

    file: CheckpointFile
    offset: int
    length: int


@dataclass(slots=True, kw_only=True, eq=False)
class Pull:
    """A pull under way.

    Attributes:
        entry: What comes.
        far: The same as its sources.
        partial: Where it lands.
        gives_way: Set while a load of the checkpoint wants to run.
        parts: What was moved so far.
        further: Set whenever it got further or ended.
        sources: Of the runs under way; closing one ends its waiting for other stores.
        done: Done when all is on disk.
    """

    entry: CatalogEntry
    far: RemoteCheckpoint
    partial: PartialCheckpoint
    done: asyncio.Future[None]
    gives_way: threading.Event = field(default_factory=threading.Event)
    parts: list[ReadPart] = field(default_factory=list)
    further: set[asyncio.Event] = field(default_factory=set)
    sources: tuple[ChunkSource, ...] = ()

    @property
    def moved(self) -> tuple[Moved, ...]:
        """What each tier moved."""
        return moved_by_tier(self.parts)


class Pulls:
    """All pulls; used from the event loop."""

    def __init__(
        self, catalog: Catalog, loads: Loads, *, pace: Pace, clock: Clock, sharing: Sharing | None = None
    ) -> None:
        """Join the parts.

        Args:
            catalog: Opens checkpoints.
            loads: Go first.
            pace: Of its tiers.
            clock: For progress.
            sharing: Gives what has landed to other stores.
        """
        self._sharing = sharing
        self._catalog = catalog
        self._loads = loads
        self._pace = pace
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._pulls: dict[tuple[str, str], Pull] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = threading.Event()

    async def pull(
        self, uri: str, *, revision: str
    ) -> AsyncIterator[tuple[CatalogEntry, int, tuple[Moved, ...]]]:
        """Yield the checkpoint, its bytes on disk and what was moved, now and then, until all is there.

        Leaving does not end the pull.

        Raises:
            InvalidRequest: It is no remote checkpoint, or this store has no disk cache.
            DiskFull: There is no room for it.
            LoadFailed: It cannot be had from anywhere.
        """
        entry = await self._catalog.open(uri, revision=revision)
        if entry.far is not None and entry.far.whole:
            yield entry, entry.far.disk_bytes(), ()
            return
        pull = self._joined(entry)
        further = asyncio.Event()
        pull.further.add(further)
        try:
            while not pull.done.done():
                further.clear()
                yield entry, pull.far.disk_bytes(), pull.moved
                await further.wait()
                await self._clock.sleep(PROGRESS_SECONDS)
            pull.done.result()
            yield entry, pull.far.disk_bytes(), pull.moved
        finally:
            pull.further.discard(further)

    async def close(self) -> None:
        """End running pulls after the ranges in flight."""
        self._stopped.set()
        for pull in self._pulls.values():
            for source in pull.sources:
                source.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _joined(self, entry: CatalogEntry) -> Pull:
        pull = self._pulls.get(entry.identity)
        if pull is not None:
            return pull
        far = entry.far
        if not isinstance(far, RemoteCheckpoint):
            raise InvalidRequest(f"{entry.uri} lies on this host already; only remote checkpoints are pulled")
        if far.cached is None:
            raise DiskFull(f"{entry.uri} can't be kept on the store's disk: {far.uncached_because}")
        if far.cached.partial is None:
            raise AssertionError("a copy that is not whole is under way")
        if len(self._pulls) >= MAX_PULLS:
            raise DiskFull(f"{MAX_PULLS} pulls are under way; try again later", retry_after_seconds=10.0)
        done: asyncio.Future[None] = self._loop.create_future()
        pull = self._pulls[entry.identity] = Pull(entry=entry, far=far, partial=far.cached.partial, done=done)
        done.add_done_callback(lambda future: future.cancelled() or future.exception())
        task = asyncio.create_task(self._run(pull), name=f"pull of {entry.uri}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return pull

    async def _run(self, pull: Pull) -> None:
        began = self._clock.now_seconds()
        try:
            while not self._stopped.is_set() and (runs := self._missing(pull)):
                if not await self._waited_for_load(pull.entry):
                    pull.partial.resume()
                    async with self._watched(pull):
                        await asyncio.to_thread(self._fetch, pull, runs[:BATCH_RUNS])
                    _check_landing(pull)
            await asyncio.to_thread(pull.partial.finish_if_covered)
            _check_landing(pull)
            if self._stopped.is_set():
                raise PeerError("the checkpoint store is being stopped", retry_after_seconds=1.0)  # noqa: TRY301 - one place tells of the end
        except Exception as error:  # noqa: BLE001 - the boundary of this task: whoever waits gets the error
            unforeseen = None if isinstance(error, StokerError) else error
            log.get().warning("pull.failed", uri=pull.entry.uri, reason=str(error), exc_info=unforeseen)
            pull.done.set_exception(error)
        else:
            self._record(pull, self._clock.now_seconds() - began)
            pull.done.set_result(None)
        finally:
            self._pulls.pop(pull.entry.identity, None)
            self._tell(pull)

    async def _waited_for_load(self, entry: CatalogEntry) -> bool:
        """Wait while a load of the checkpoint is under way or landing; tell whether there was one."""
        waited = False
        with self._loads.changes.watched() as changed:
            while self._is_loaded(entry):
                waited = True
                await changed.wait()
                changed.clear()
        return waited

    def _is_loaded(self, entry: CatalogEntry) -> bool:
        return any(
            each.entry.identity == entry.identity and (each.reads_left or each.landings_left)
            for each in self._loads.residents()
        )

    @asynccontextmanager
    async def _watched(self, pull: Pull) -> AsyncIterator[None]:
        """Tell a pull's threads when a load of its checkpoint begins."""
        watching = asyncio.create_task(self._watch(pull), name=f"loads of {pull.entry.uri}")
        try:
            yield
        finally:
            watching.cancel()
            pull.gives_way.clear()

    async def _watch(self, pull: Pull) -> None:
        with self._loads.changes.watched() as changed:
            while not self._is_loaded(pull.entry):
                await changed.wait()
                changed.clear()
        pull.gives_way.set()

    def _missing(self, pull: Pull) -> list[Run]:
        chunk_bytes = self._loads.arena.chunk_bytes
        runs = []
        for file in pull.entry.index.files:
            size = chunk_bytes * run_chunks(pull.far.far_file(file), chunk_bytes)
            for offset in range(0, file.size_bytes, size):
                length = min(size, file.size_bytes - offset)
                if not pull.partial.has(file.name, offset, offset + length):
                    runs.append(Run(file=file, offset=offset, length=length))
        return runs

    def _fetch(self, pull: Pull, runs: list[Run]) -> None:
        """Bring some runs to the disk; blocks. Each file is opened once: whoever pulls it shares chunks."""
        chunk_bytes = self._loads.arena.chunk_bytes
        with ExitStack() as stack:
            opened: dict[str, OpenedFile] = {}
            for file in {run.file.name: run.file for run in runs}.values():
                far = pull.far.open(file, _not_here, chunk_bytes=chunk_bytes, gives_way=True)
                stack.callback(far.source.close)
                opened[file.name] = far
                self._share_what_is_there(pull, file)
            pull.sources = tuple(each.source for each in opened.values())
            with ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="pull") as threads:
                for _ in threads.map(lambda run: self._bring(pull, run, opened[run.file.name]), runs):
                    if self._is_interrupted(pull):
                        threads.shutdown(wait=True, cancel_futures=True)
                        return

    def _is_interrupted(self, pull: Pull) -> bool:
        return self._stopped.is_set() or pull.gives_way.is_set()

    def _bring(self, pull: Pull, run: Run, opened: OpenedFile) -> None:
        if self._is_interrupted(pull):
            return
        chunk_bytes = self._loads.arena.chunk_bytes
        buffer = mmap.mmap(-1, -(-run.length // chunk_bytes) * chunk_bytes)  # on a page's boundary
        memory = memoryview(buffer)
        chunks = [memory[at : at + chunk_bytes] for at in range(0, len(memory), chunk_bytes)]
        try:
            parts = self._pace.hold(fill_run(opened.source, chunks, offset=run.offset, length=run.length))
        except GaveWay:
            return
        if opened.land is not None:
            opened.land(chunks, run.offset, run.length)
        self._share(pull, run.file, range(run.offset, run.offset + run.length, chunk_bytes))
        self._loop.call_soon_threadsafe(self._moved, pull, parts)

    def _share_what_is_there(self, pull: Pull, file: CheckpointFile) -> None:
        self._share(pull, file, range(0, file.size_bytes, self._loads.arena.chunk_bytes))

    def _share(self, pull: Pull, file: CheckpointFile, offsets: range) -> None:
        """Give other stores those chunks of a file, by their offsets, that are on the disk."""
        if self._sharing is None:
            return
        bits = 0
        for offset in offsets:
            end = min(offset + offsets.step, file.size_bytes)
            if pull.partial.has(file.name, offset, end):
                bits |= 1 << offset // offsets.step
        revision = pull.entry.index.revision
        self._sharing.landed(revision, file, bits, lambda: pull.far.locate(file))

    def _moved(self, pull: Pull, parts: list[ReadPart]) -> None:
        pull.parts += parts
        self._loads.transfers.rates.add(parts)
        self._tell(pull)

    def _tell(self, pull: Pull) -> None:
        for event in pull.further:
            event.set()

    def _record(self, pull: Pull, seconds: float) -> None:
        tiers: dict[str, float] = {}
        for moved in pull.moved:
            metrics.PULLED_BYTES.labels(tier=moved.tier).inc(moved.byte_count)
            tiers[f"{moved.tier}_bytes"] = moved.byte_count
            tiers[f"{moved.tier}_seconds"] = round(moved.seconds, 4)
        log.get().info(
            "checkpoint.pulled",
            uri=pull.entry.uri,
            revision=pull.entry.index.revision,
            bytes=pull.entry.index.weight_bytes,
            seconds=round(seconds, 4),
            **tiers,
        )


def _not_here(file: CheckpointFile) -> ChunkSource:
    raise LoadFailed(f"{file.path} is whole on this host by now; pull again")


def _check_landing(pull: Pull) -> None:
    if pull.partial.stopped_because:
        raise DiskFull(
            f"{pull.entry.uri} cannot be written to {pull.partial.folder}: {pull.partial.stopped_because}; "
            "free space and pull again, what is there is kept"
        )
