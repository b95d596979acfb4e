"""What a host offers: each probe tries the real thing and says what it found and what to change."""

from __future__ import annotations

import importlib.util
import mmap
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import grpc

from stoker.units import GIB, MIB, format_bytes
from stoker.v1 import checkpoint_store_pb2, checkpoint_store_pb2_grpc

THP = Path("/sys/kernel/mm/transparent_hugepage")
MIN_FREE_BYTES = 4 * GIB
DIRECT_BYTES = 4096
_HUGE_PAGE_BYTES = 2 * MIB
_POOL_PAGES = "pool pages"
_STORE_SECONDS = 2.0


class Level(StrEnum):
    """How a finding matters."""

    good = "good"
    advice = "advice"
    bad = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing the host offers, or lacks."""

    subject: str
    level: Level
    found: str
    advice: str = ""


def probe_host(data_dir: Path, *, etcd_address: str = "", store_address: str = "") -> list[Finding]:
    """Try everything; takes well under a second but for GPUs (`nvidia-smi`, at most 5 s).

    Args:
        data_dir: Folder to try direct I/O in.
        etcd_address: `host:port` of a member to try; empty = none.
        store_address: `host:port` of this host's store; empty = none runs.
    """
    pages = [probe_huge_pages(), probe_shmem_huge_pages()]
    pool = probe_pool_pages(store_address)
    if store_address and pool.level is Level.good:
        pages = [without_advice(page) for page in pages]
    return [
        probe_python(),
        probe_memory(),
        probe_direct_io(data_dir),
        *pages,
        pool,
        probe_memory_lock(),
        probe_open_files(),
        probe_gpus(),
        probe_etcd(etcd_address),
    ]


def without_advice(page: Finding) -> Finding:
    """Return what was found of one way to huge pages where the pool has got them by another; pure."""
    return replace(page, level=Level.good, advice="")


def probe_python() -> Finding:
    """Check the interpreter and the optional parts."""
    version = ".".join(map(str, sys.version_info[:3]))
    parts = {"torch": "torch", "transformers": "torch", "fastapi": "gateway", "gguf": "convert"}
    missing = sorted({extra for name, extra in parts.items() if importlib.util.find_spec(name) is None})
    if missing:
        return Finding(
            subject="python",
            level=Level.advice,
            found=f"{version}, without {', '.join(missing)}",
            advice=f"pip install 'stoker[{','.join(missing)}]' on hosts that need it",
        )
    return Finding(subject="python", level=Level.good, found=f"{version}, all parts installed")


def probe_memory() -> Finding:
    """Check that a pool of some size fits."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    total = int(fields["MemTotal"].split()[0]) * 1024
    found = f"{format_bytes(available)} free of {format_bytes(total)}"
    if available < MIN_FREE_BYTES:
        return Finding(
            subject="memory",
            level=Level.advice,
            found=found,
            advice="models load into host memory: free some",
        )
    return Finding(subject="memory", level=Level.good, found=found)


def probe_direct_io(data_dir: Path) -> Finding:
    """Read a block with O_DIRECT from the folder checkpoints would live in."""
    folder = next(path for path in (data_dir, *data_dir.parents) if path.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(DIRECT_BYTES))
            file.flush()
            descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
            try:
                with mmap.mmap(-1, DIRECT_BYTES) as aligned:
                    os.preadv(descriptor, [aligned], 0)
            finally:
                os.close(descriptor)
    except OSError as error:
        return Finding(
            subject="direct I/O",
            level=Level.advice,
            found=f"refused in {folder}: {error.strerror}",
            advice="keep checkpoints on a local ext4 or xfs: reads go through the page cache otherwise",
        )
    return Finding(subject="direct I/O", level=Level.good, found=f"works in {folder}")


def probe_huge_pages() -> Finding:
    """Look for explicitly reserved huge pages."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    size_bytes = fields.get("Hugepagesize", 0) * 1024
    free_bytes = fields.get("HugePages_Free", 0) * size_bytes
    if free_bytes:
        return Finding(
            subject="huge pages", level=Level.good, found=f"{format_bytes(free_bytes)} reserved and free"
        )
    return Finding(
        subject="huge pages",
        level=Level.advice,
        found="none reserved",
        advice="sysctl vm.nr_hugepages=N (2 MiB each) for the pool: about twice the speed of 4 KiB pages",
    )


def probe_shmem_huge_pages() -> Finding:
    """Look at whether shared memory may get huge pages without reserving them."""
    setting = THP / "shmem_enabled"
    if not setting.exists():
        return Finding(subject="shared THP", level=Level.advice, found="not known to this kernel")
    chosen = setting.read_text().split("[")[1].split("]")[0]
    if chosen in ("always", "within_size", "advise", "force"):
        return Finding(subject="shared THP", level=Level.good, found=chosen)
    return Finding(
        subject="shared THP",
        level=Level.advice,
        found=chosen,
        advice=f"echo advise > {setting} (or reserve huge pages)",
    )


def probe_pool_pages(store_address: str) -> Finding:
    """Ask a running store which pages its pool really got; what the kernel promises is not what it gives."""
    if not store_address:
        return Finding(subject=_POOL_PAGES, level=Level.good, found="no store runs here; seen once one does")
    try:
        with grpc.insecure_channel(store_address) as channel:
            stub = checkpoint_store_pb2_grpc.CheckpointStoreStub(channel)
            pool = stub.GetStatus(checkpoint_store_pb2.GetStatusRequest(), timeout=_STORE_SECONDS).pool
    except grpc.RpcError as error:
        return Finding(
            subject=_POOL_PAGES,
            level=Level.advice,
            found=f"the store at {store_address} does not answer: {error.code().name}",
            advice="see its log",
        )
    return pool_pages(pool)


def pool_pages(pool: checkpoint_store_pb2.PoolStatus) -> Finding:
    """Say which pages a pool has; pure."""
    found = f"{pool.page_bytes:,} bytes ({pool.backing}) in a pool of {format_bytes(pool.total_bytes)}"
    if pool.page_bytes >= _HUGE_PAGE_BYTES:
        return Finding(subject=_POOL_PAGES, level=Level.good, found=found)
    return Finding(
        subject=_POOL_PAGES,
        level=Level.advice,
        found=found,
        advice="loads take twice as long as on 2 MiB pages: reserve them (vm.nr_hugepages), or let the store "
        "mount a tmpfs with huge pages (CAP_SYS_ADMIN)",
    )


def probe_memory_lock() -> Finding:
    """Look at how much memory may be locked: GPUs need the pool pinned."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding(subject="memory lock", level=Level.good, found="unlimited")
    return Finding(
        subject="memory lock",
        level=Level.advice if soft < GIB else Level.good,
        found=format_bytes(soft),
        advice="ulimit -l unlimited (docker: ulimits.memlock) on GPU hosts" if soft < GIB else "",
    )


def probe_open_files() -> Finding:
    """Look at the descriptor limit: each stream takes two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= 4096  # noqa: PLR2004 - two thousand streams
    limits = ["unlimited" if limit == resource.RLIM_INFINITY else str(limit) for limit in (soft, hard)]
    return Finding(
        subject="open files",
        level=Level.good if enough else Level.advice,
        found=f"{limits[0]} (hard limit {limits[1]})",
        advice="" if enough else "ulimit -n 65536",
    )


def probe_gpus() -> Finding:
    """List NVIDIA GPUs as the driver names them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding(subject="GPUs", level=Level.good, found="none (models run on the CPU)")
    try:
        query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        return Finding(
            subject="GPUs",
            level=Level.advice,
            found=f"nvidia-smi fails: {error}",
            advice="check the driver: dmesg | grep -i nvrm",
        )
    gpus = [line.split(", ") for line in answer.stdout.strip().splitlines()]
    listed = ", ".join(
        f"{name} {format_bytes(int(mib) * MIB) if mib.isdecimal() else mib}" for name, mib in gpus
    )
    return Finding(subject="GPUs", level=Level.good, found=listed or "none")


def probe_etcd(address: str) -> Finding:
    """Try to reach etcd where an address was given; otherwise look for the binary."""
    if address:
        host, _, port = address.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), timeout=2):
                return Finding(subject="etcd", level=Level.good, found=f"{address} accepts connections")
        except (OSError, ValueError) as error:
            return Finding(
                subject="etcd",
                level=Level.bad,
                found=f"{address} cannot be reached: {error}",
                advice="start it, or give host:port of a member's client port (2379)",
            )
    binary = shutil.which("etcd")
    found = f"{binary}" if binary else "not installed; one host needs none (embedded state)"
    return Finding(subject="etcd", level=Level.good, found=found)
