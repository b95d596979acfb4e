"""A disk made slower for some processes, by the kernel's own means; undone at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CGROUP_V1 = Path("/sys/fs/cgroup/blkio")
CGROUP_V2 = Path("/sys/fs/cgroup")


@contextmanager
def slow_disk(folder: Path, *, read_bytes_per_second: int, process_ids: list[int]) -> Iterator[None]:
    """Limit how fast these processes read the disk that `folder` is on.

    Raises:
        SystemExit: The kernel or this user's rights don't allow it: why.
    """
    device = _whole_disk(folder.stat().st_dev)
    v1 = (CGROUP_V1 / "blkio.throttle.read_bps_device").exists()
    group = (CGROUP_V1 if v1 else CGROUP_V2) / f"stoker-benchmark-{os.getpid()}"
    try:
        group.mkdir()
        try:
            if v1:
                (group / "blkio.throttle.read_bps_device").write_text(f"{device} {read_bytes_per_second}\n")
            else:
                (group / "io.max").write_text(f"{device} rbps={read_bytes_per_second}\n")
            for process_id in process_ids:
                (group / "cgroup.procs").write_text(str(process_id))
            yield
        finally:
            for process_id in (group / "cgroup.procs").read_text().split():
                with suppress(OSError):  # it has ended
                    (group.parent / "cgroup.procs").write_text(process_id)
            group.rmdir()
    except OSError as error:
        raise SystemExit(f"cannot slow the disk down with {group}: {error}; run as root") from error


def children_running(module: str) -> list[int]:
    """Return the ids of this process's children that run `python -m module`."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and module in (folder / "cmdline").read_bytes().decode().split("\0"):
                found.append(int(folder.name))
    return found


def _whole_disk(device: int) -> str:
    """Return major:minor of the disk that a file system's device is on; limits don't apply to partitions."""
    name = f"{os.major(device)}:{os.minor(device)}"
    folder = Path("/sys/dev/block") / name
    if (folder / "partition").exists():
        return (folder.resolve().parent / "dev").read_text().strip()
    return name
