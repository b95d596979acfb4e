"""What the hardware gives: fio and a bare preadv loop, on the same file, into the same kind of pages.

Run as a script it is the loop in a fresh process: `python loading_limit.py FILE direct|buffered THREADS`
maps memory of the store's kind, faults it in, prints `ready`, waits for a line, reads the whole file by
16 MiB, and prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.store.pool.page_ladder import SharedMemory, measured_page_bytes, open_shared_memory
from services.store.settings import HugeTmpfs
from stoker.units import MIB, align_up

BLOCK_BYTES = 16 * MIB
THREADS = 4


def pool_memory(length: int) -> SharedMemory:
    """Return memory of the kind that the store's pool has, faulted in."""
    shared = open_shared_memory(
        align_up(length, BLOCK_BYTES),
        chunk_bytes=BLOCK_BYTES,
        huge_tmpfs_dir=None,
        huge_tmpfs=HugeTmpfs.PRIVATE,
    )
    shared.memory.fault_in(0, shared.memory.length, write=True)
    return shared


@contextmanager
def fio_buffer() -> Iterator[SharedMemory | None]:
    """Memory that fio can map; None when there is no fio."""
    if shutil.which("fio") is None:
        yield None
        return
    shared = pool_memory(THREADS * BLOCK_BYTES)
    try:
        yield shared
    finally:
        os.close(shared.descriptor)


def fio(path: Path, buffer: SharedMemory, *, cold: bool) -> dict[str, float]:
    """Read `path` once with fio into `buffer`; direct when cold, through the page cache when warm.

    Each of `THREADS` processes reads its own part of the file; what is left of the last block is not read.
    """
    part = path.stat().st_size // THREADS // BLOCK_BYTES * BLOCK_BYTES
    command = [
        "fio", "--name=limit", f"--filename={path}", "--readonly", "--rw=read", f"--direct={int(cold)}",
        "--invalidate=0", "--ioengine=psync", f"--bs={BLOCK_BYTES}", f"--numjobs={THREADS}",
        f"--offset_increment={part}", f"--size={part}", "--group_reporting", "--output-format=json",
        f"--mem=mmapshared:/proc/{os.getpid()}/fd/{buffer.descriptor}",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    (job,) = json.loads(run.stdout[run.stdout.index("{") :])["jobs"]
    read = job["read"]
    if not read["io_bytes"]:
        raise RuntimeError(f"fio read nothing of {path}: {run.stderr or run.stdout}")
    return {
        "wall_seconds": read["io_bytes"] / read["bw_bytes"],
        "cpu_seconds": (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000,
        "tensor_bytes": read["io_bytes"],
    }


def preadv_loop(path: Path, *, direct: bool, threads: int) -> None:
    """Be the loop: see the module."""
    size = path.stat().st_size
    shared = pool_memory(size)
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    offsets = iter(range(0, size, BLOCK_BYTES))
    lock = threading.Lock()

    def run() -> None:
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            done = 0
            while done < min(BLOCK_BYTES, size - offset):
                block = shared.memory.view(offset + done, BLOCK_BYTES - done)
                done += os.preadv(descriptor, [block], offset + done)

    print("ready", flush=True)
    sys.stdin.readline()
    began_cpu, began = time.process_time(), time.perf_counter()
    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    answer = {
        "wall_seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - began_cpu,
        "tensor_bytes": size,
        "page_bytes": measured_page_bytes(shared.memory),
    }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    preadv_loop(Path(sys.argv[1]), direct=sys.argv[2] == "direct", threads=int(sys.argv[3]))
