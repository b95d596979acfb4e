"""What `loading.py` needs around a measurement: the page cache's state, a daemon, fresh processes."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from setting import ROOT

from stoker.units import MIB
from stoker.v1 import checkpoint_store_pb2, checkpoint_store_pb2_grpc

_ROWS = Path(__file__).with_name("loading_rows.py")
_START_SECONDS = 120.0
_LIBC = ctypes.CDLL(None, use_errno=True)
_COLD_AT_MOST = 0.01
_WARM_AT_LEAST = 0.99


def make_cold(files: Sequence[Path]) -> None:
    """Drop the files from the page cache; raises when some of it stays."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if _cached_share(descriptor) > _COLD_AT_MOST:
                raise RuntimeError(f"{path} stays in the page cache: another process maps it")
        finally:
            os.close(descriptor)


def make_warm(path: Path, others: Sequence[Path]) -> None:
    """Bring all of `path` into the page cache and the other files out of it."""
    make_cold([other for other in others if other != path])
    buffer = bytearray(16 * MIB)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while os.readv(descriptor, [buffer]):
            pass
        if _cached_share(descriptor) < _WARM_AT_LEAST:
            raise RuntimeError(f"{path} does not stay in the page cache: this machine has too little memory")
    finally:
        os.close(descriptor)


def _cached_share(descriptor: int) -> float:
    """Return how much of a file is in the page cache, 0 … 1; reads nothing of it."""
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as memory:
        pages = -(-len(memory) // mmap.PAGESIZE)
        present = (ctypes.c_ubyte * pages)()
        first = ctypes.c_char.from_buffer(memory)
        try:
            size = ctypes.c_size_t(len(memory))
            result = _LIBC.mincore(ctypes.c_void_p(ctypes.addressof(first)), size, present)
        finally:
            del first
        if result:
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(bytes(present)) / pages


class Daemon:
    """A store daemon whose pool holds the checkpoint, faulted in."""

    def __init__(self, run_dir: Path, pool_bytes: int) -> None:
        """Start it and wait until all of its pool's pages are there."""
        self.socket = run_dir / "attach.sock"
        self._address = f"unix:{run_dir / 'grpc.sock'}"
        self._log = run_dir / "log"
        settings = {"run_dir": run_dir, "address": self._address, "pool_bytes": pool_bytes}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("STOKER_")}
        environment |= {f"STOKER_STORE_{name.upper()}": str(value) for name, value in settings.items()}
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.store"], env=environment, stderr=output, cwd=ROOT
            )
        deadline = time.monotonic() + _START_SECONDS
        while not (faulted_in := self._logged("pool.faulted_in")):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the store did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.1)
        self.pages = f"{faulted_in[0]['backing']}, pages of {faulted_in[0]['page_bytes']:,} bytes"

    def cpu_seconds(self) -> float:
        """Return the processor time that its threads have taken so far; exact to the microsecond."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def evict(self, folder: Path) -> None:
        """Drop a checkpoint from the pool, once the store has heard that no worker has it any more."""
        deadline = time.monotonic() + _START_SECONDS
        with grpc.insecure_channel(self._address) as channel:
            stub = checkpoint_store_pb2_grpc.CheckpointStoreStub(channel)
            while True:
                try:
                    stub.Evict(checkpoint_store_pb2.EvictRequest(uri=str(folder)), timeout=30)
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.FAILED_PRECONDITION or time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
                else:
                    return

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)

    def _logged(self, event: str) -> list[dict[str, object]]:
        lines = (json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{"))
        return [line for line in lines if line.get("event") == event]


@contextmanager
def daemon(pool_bytes: int) -> Iterator[Daemon]:
    """Run a daemon in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="stoker-loading-") as folder:
        running = Daemon(Path(folder), pool_bytes)
        try:
            yield running
        finally:
            running.close()


class RowServer:
    """A process of one python that has imported what its rows need, and forks one that loads at each order.

    Attributes:
        missing: Rows whose library is not there, with the reason.
    """

    def __init__(self, python: str, rows: Sequence[str]) -> None:
        """Start it; returns when its imports are done, seconds later."""
        self._process = subprocess.Popen(
            [python, str(_ROWS), "serve", json.dumps(list(rows))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        )
        self.missing: dict[str, str] = self._hear("importing")["missing"]

    def load(self, row: str, paths: dict[str, str], prepare: Callable[[], None]) -> dict[str, float]:
        """Load once in a fresh process; `prepare` is called when it is ready, right before its clock starts.

        Raises:
            RuntimeError: It died.
        """
        self._say({"row": row, "paths": paths})
        self._hear(row)
        prepare()
        self._say("go")
        answer: dict[str, float] = self._hear(row)
        return answer

    def close(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(30)

    def _say(self, what: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def _hear(self, about: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{about}: the process that loads ended; its errors are above")
        return json.loads(line)


def in_fresh_process(command: Sequence[str], prepare: Callable[[], None]) -> dict[str, float]:
    """Start a command that prints `ready`, prepare the page cache, then let it run; returns its answer."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline().strip() == "ready":
            prepare()
            process.stdin.write("go\n")
            process.stdin.flush()
        line = process.stdout.readline()
    if process.returncode or not line.strip():
        raise RuntimeError(f"{' '.join(command[1:3])} failed ({process.returncode}); its errors are above")
    answer: dict[str, float] = json.loads(line)
    return answer
