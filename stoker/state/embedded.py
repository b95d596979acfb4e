"""The embedded backend: the state in an SQLite file inside the controller, for one host.

Everything that touches the file runs in one named thread, in order. The event loop keeps the deadlines of
leases and wakes watches; a watch reads history from the file, so a slow one costs no memory. Leases start
their whole time again when the file is opened: time in which nobody could renew does not count.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stoker.background import Background, background
from stoker.clock import Clock, SystemClock
from stoker.errors import DiskFull
from stoker.state.errors import LeaseLost, StateUnavailable
from stoker.state.file_lock import owned
from stoker.state.leases import Lease
from stoker.state.protocol import (
    DEFAULT_TIMEOUT_SECONDS,
    Compare,
    LeaseId,
    Outcome,
    Resync,
    Snapshot,
    Versioned,
    WatchEvent,
    Write,
    check_transaction,
)
from stoker.state.tables import DEFAULT_KEEP_REVISIONS, Forgotten, Tables

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

T = TypeVar("T")

MEMORY = ":memory:"
MAX_CALLS_IN_THREAD = 64
"""Calls handed to the thread at once; further ones wait for their turn within their timeout."""
EXPIRY_RETRY_SECONDS = 1.0
"""Pause before the keys of an expired lease are deleted again after the file refused (a full disk)."""


@asynccontextmanager
async def open_embedded(
    path: str, *, clock: Clock | None = None, keep_revisions: int = DEFAULT_KEEP_REVISIONS
) -> AsyncGenerator[EmbeddedState, None]:
    """Open the state file, made where there is none, and close it when the block ends.

    Args:
        path: The file; `:memory:` for a state that ends with the block.
        clock: What leases live by.
        keep_revisions: How many revisions of history stay for watches that resume.

    Raises:
        ConfigError: The file is in use by another process, or not usable.
    """
    with (
        nullcontext() if path == MEMORY else owned(Path(path)),
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="stoker-state") as thread,
    ):
        loop = asyncio.get_running_loop()
        tables = await loop.run_in_executor(thread, lambda: Tables(path, keep_revisions=keep_revisions))
        try:
            async with background() as tasks:
                store = EmbeddedState(tables, thread=thread, tasks=tasks, clock=clock or SystemClock())
                await store.arm_leases()
                try:
                    yield store
                finally:
                    store.close()
        finally:
            await loop.run_in_executor(thread, tables.close)


class EmbeddedState:
    """A `StateStore` over `Tables`; made by `open_embedded`, belongs to one event loop."""

    def __init__(
        self, tables: Tables, *, thread: ThreadPoolExecutor, tasks: Background, clock: Clock
    ) -> None:
        self._tables = tables
        self._thread = thread
        self._tasks = tasks
        self._clock = clock
        self._slots = asyncio.Semaphore(MAX_CALLS_IN_THREAD)
        self._changed = asyncio.Event()
        self._deadlines: dict[LeaseId, float] = {}
        self._ttls: dict[LeaseId, float] = {}
        self._closed = False

    async def arm_leases(self) -> None:
        """Give the leases found in the file their whole time, from now."""
        for lease_id, ttl_seconds in (await self._call(self._tables.leases)).items():
            self._arm(lease_id, ttl_seconds)

    def close(self) -> None:
        """End all watches and refuse further calls."""
        self._closed = True
        self._wake_watches()

    async def get(self, key: str, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Versioned | None:
        """Return the key as it stands; see the protocol."""
        return await self._call(lambda: self._tables.get(key), timeout_seconds)

    async def list(self, prefix: str, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Snapshot:
        """Return all keys under `prefix`; see the protocol."""
        return await self._call(lambda: self._tables.list(prefix), timeout_seconds)

    async def transact(
        self,
        compares: Sequence[Compare],
        writes: Sequence[Write],
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> Outcome:
        """Write everything if every compare holds, else nothing; see the protocol."""
        check_transaction(compares, writes)
        return await self._call(lambda: self._tables.transact(compares, writes), timeout_seconds)

    async def watch(
        self, prefix: str, *, after_revision: int | None = None
    ) -> AsyncGenerator[WatchEvent, None]:
        """Iterate over what happens under `prefix`; see the protocol."""
        revision = after_revision
        while True:
            changed = self._changed
            if revision is None:
                snapshot = await self._call(lambda: self._tables.list(prefix))
                revision = snapshot.revision
                yield Resync(snapshot=snapshot)
                continue
            history = await self._call(
                lambda after=revision: self._tables.history(prefix, after_revision=after)  # type: ignore[misc]
            )
            if isinstance(history, Forgotten):
                revision = None
                continue
            for changes in history.changes:
                yield changes
            if history.upto_revision == revision:
                await changed.wait()
            revision = history.upto_revision

    async def grant(self, ttl_seconds: float, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Lease:
        """Return a new lease; see the protocol."""
        granted_seconds = self._clock.now_seconds()
        whole_seconds = max(1, math.ceil(ttl_seconds))
        lease_id = await self._call(lambda: self._tables.grant(whole_seconds), timeout_seconds)
        self._arm(lease_id, whole_seconds)
        return Lease(
            lease_id,
            ttl_seconds=whole_seconds,
            granted_seconds=granted_seconds,
            store=self,
            clock=self._clock,
        )

    async def renew(self, lease_id: LeaseId, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """Give the lease its whole time again; see the protocol."""
        del timeout_seconds  # never waits: deadlines live in memory
        self._check_open()
        if lease_id not in self._deadlines:
            raise LeaseLost(f"lease {lease_id} is over: its keys are gone; ask for a new one")
        self._deadlines[lease_id] = self._clock.now_seconds() + self._ttls[lease_id]

    async def revoke(self, lease_id: LeaseId, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """End the lease and delete its keys; see the protocol."""
        await self._call(lambda: self._tables.revoke(lease_id), timeout_seconds)
        self._deadlines.pop(lease_id, None)

    async def compact(self, revision: int, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """Forget history up to and including `revision`; see the protocol."""
        await self._call(lambda: self._tables.compact(revision), timeout_seconds)

    def _arm(self, lease_id: LeaseId, ttl_seconds: float) -> None:
        self._ttls[lease_id] = ttl_seconds
        self._deadlines[lease_id] = self._clock.now_seconds() + ttl_seconds
        self._tasks.start(self._expire(lease_id), name=f"lease-expiry-{lease_id}")

    async def _expire(self, lease_id: LeaseId) -> None:
        """Wait until the lease is over, whenever that will be, and delete its keys."""
        while (deadline_seconds := self._deadlines.get(lease_id)) is not None:
            remaining_seconds = deadline_seconds - self._clock.now_seconds()
            if remaining_seconds <= 0:
                del self._deadlines[lease_id]
                break
            await self._clock.sleep(remaining_seconds)
        del self._ttls[lease_id]
        while True:
            try:
                return await self._call(lambda: self._tables.revoke(lease_id))
            except (StateUnavailable, DiskFull):
                await self._clock.sleep(EXPIRY_RETRY_SECONDS)

    async def _call(self, work: Callable[[], T], timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> T:
        """Run `work` in the state's thread."""
        self._check_open()
        loop = asyncio.get_running_loop()

        def run() -> T:
            before = self._tables.revision
            try:
                return work()
            finally:
                if self._tables.revision != before:
                    loop.call_soon_threadsafe(self._wake_watches)

        try:
            async with asyncio.timeout(timeout_seconds), self._slots:
                return await loop.run_in_executor(self._thread, run)
        except TimeoutError as error:
            raise StateUnavailable(
                f"state file did not answer within {timeout_seconds:g} s: its disk is overloaded or hangs",
                retry_after_seconds=1.0,
            ) from error
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise DiskFull("state file cannot grow: free space in the data folder") from error
            raise StateUnavailable(f"state file failed: {error}", retry_after_seconds=1.0) from error

    def _check_open(self) -> None:
        if self._closed:
            raise StateUnavailable("state is closed: this process is stopping")

    def _wake_watches(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
