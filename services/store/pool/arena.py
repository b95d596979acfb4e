"""The pool's memory: one shared arena, faulted in by background threads, cut into chunks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.store.pool.page_ladder import SharedMemory, measured_page_bytes, open_shared_memory
from services.store.settings import FaultIn, StoreSettings
from stoker import log
from stoker.attach.memory import MappedRange
from stoker.errors import ConfigError
from stoker.units import MIB, format_bytes

AUTO_FRACTION = 0.25
"""Of the available memory: a laptop keeps working; a server's operator says how much."""

_FAULT_IN_NICENESS = 10
"""Loads and workers go first: the kernel gives these threads about a tenth of a busy core."""

_FAULT_IN_STEP_BYTES = 64 * MIB
_UNLIMITED = "max"


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultedIn:
    """What faulting in took.

    Attributes:
        byte_count: Bytes whose pages are there.
        seconds: Wall time.
        page_bytes: What the kernel gave.
    """

    byte_count: int
    seconds: float
    page_bytes: int


class Arena:
    """Shared memory in chunks.

    Attributes:
        chunk_bytes: Size of a chunk.
        chunk_count: How many there are.
        page_bytes: What the kernel really gave, measured.
    """

    def __init__(self, shared: SharedMemory, *, chunk_bytes: int) -> None:
        """Take over `shared`; the first chunk is faulted in to see what pages come."""
        self._shared = shared
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._views: dict[int, memoryview] = {}
        self.chunk_bytes = chunk_bytes
        self.chunk_count = shared.memory.length // chunk_bytes
        shared.memory.fault_in(0, chunk_bytes, write=True)
        self.page_bytes = measured_page_bytes(shared.memory)

    @property
    def total_bytes(self) -> int:
        """All chunks together."""
        return self.chunk_count * self.chunk_bytes

    @property
    def backing(self) -> str:
        """Which kind of memory was asked for, corrected by what came."""
        huge = self.page_bytes > os.sysconf("SC_PAGESIZE")
        return "memfd" if self._shared.backing == "memfd_huge" and not huge else self._shared.backing

    def chunk(self, number: int) -> memoryview:
        """Return a chunk's memory, writable; made once: a load asks for each of its chunks."""
        view = self._views.get(number)
        if view is None:
            view = self._shared.memory.view(number * self.chunk_bytes, self.chunk_bytes)
            self._views[number] = view
        return view

    def offset(self, number: int) -> int:
        """Return where a chunk starts in the arena, in bytes."""
        return number * self.chunk_bytes

    def read_only_descriptor(self) -> int:
        """Return a descriptor for others; the caller closes it."""
        return self._shared.read_only_descriptor()

    def fault_in(
        self, threads: int, *, step_done: Callable[[Sequence[int]], None], done: Callable[[FaultedIn], None]
    ) -> None:
        """Allocate all pages in the background, low chunks first.

        Args:
            threads: How many share the work.
            step_done: Called from those threads with the chunks whose pages are there now.
            done: Called once from the last of them, unless closed before.
        """
        work = _FaultInWork(
            self._shared.memory,
            chunk_bytes=self.chunk_bytes,
            stopped=self._stopped,
            threads=threads,
            step_done=step_done,
            done=lambda faulted_in: self._finish(faulted_in, done),
        )
        self._threads = [
            threading.Thread(target=work.run, name=f"fault-in-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _finish(self, faulted_in: FaultedIn, done: Callable[[FaultedIn], None]) -> None:
        self.page_bytes = faulted_in.page_bytes
        done(faulted_in)

    def close(self) -> None:
        """Stop faulting in and give the memory back; workers that mapped it keep it."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        os.close(self._shared.descriptor)


class _FaultInWork:
    """Steps of chunks that threads take in order."""

    def __init__(  # noqa: PLR0913 - what the threads share
        self,
        memory: MappedRange,
        *,
        chunk_bytes: int,
        stopped: threading.Event,
        threads: int,
        step_done: Callable[[Sequence[int]], None],
        done: Callable[[FaultedIn], None],
    ) -> None:
        self._memory = memory
        self._chunk_bytes = chunk_bytes
        self._stopped = stopped
        self._step_done = step_done
        self._done = done
        per_step = max(1, _FAULT_IN_STEP_BYTES // chunk_bytes)
        chunks = range(memory.length // chunk_bytes)
        self._steps = iter([chunks[at : at + per_step] for at in range(0, len(chunks), per_step)])
        self._lock = threading.Lock()
        self._running = threads
        self._byte_count = 0
        self._began = time.monotonic()

    def run(self) -> None:
        with suppress(OSError):  # a sandbox may forbid it; it is a courtesy
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _FAULT_IN_NICENESS)
        while not self._stopped.is_set():
            with self._lock:
                step = next(self._steps, None)
            if step is None:
                break
            length = len(step) * self._chunk_bytes
            if not self._memory.fault_in(step[0] * self._chunk_bytes, length, write=True):
                log.get().warning("pool.fault_in_refused", chunk=step[0], action="pages come at first use")
                break
            with self._lock:
                self._byte_count += length
            self._step_done(step)
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last and not self._stopped.is_set():
            seconds = time.monotonic() - self._began
            page_bytes = measured_page_bytes(self._memory)
            self._done(FaultedIn(byte_count=self._byte_count, seconds=seconds, page_bytes=page_bytes))


def open_arena(settings: StoreSettings) -> Arena:
    """Open the pool's memory as the settings say; takes milliseconds, pages come later.

    Raises:
        ConfigError: It is larger than the memory of this host, or smaller than a chunk.
    """
    available = available_bytes()
    pool_bytes = settings.pool_bytes or int(available * AUTO_FRACTION)
    chunk_count = pool_bytes // settings.chunk_bytes
    if chunk_count == 0:
        raise ConfigError(
            f"a pool of {format_bytes(pool_bytes)} has no room for one chunk of "
            f"{format_bytes(settings.chunk_bytes)}; raise STOKER_STORE_POOL_BYTES"
        )
    if pool_bytes > available and settings.fault_in is FaultIn.EAGER:
        raise ConfigError(
            f"STOKER_STORE_POOL_BYTES asks for {format_bytes(pool_bytes)}, this host has "
            f"{format_bytes(available)} available; lower it"
        )
    shared = open_shared_memory(
        chunk_count * settings.chunk_bytes,
        chunk_bytes=settings.chunk_bytes,
        huge_tmpfs_dir=settings.huge_tmpfs_dir,
        huge_tmpfs=settings.huge_tmpfs,
    )
    return Arena(shared, chunk_bytes=settings.chunk_bytes)


def available_bytes() -> int:
    """Return how much memory can be taken: of the host (reserved huge pages included) and of its cgroup."""
    fields = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0])
    host = fields["MemAvailable"] * 1024
    huge = fields.get("HugePages_Free", 0) * fields.get("Hugepagesize", 0) * 1024
    return max(huge, min(host, _cgroup_left_bytes(host)))


def _cgroup_left_bytes(otherwise: int) -> int:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return otherwise
    return otherwise if limit == _UNLIMITED else max(0, int(limit) - used)
