"""The slots of this host: its CUDA devices, or declared CPU slots; found without CUDA or torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from stoker import log
from stoker.units import MIB
from stoker.v1.node_agent_pb2 import Device

_QUERY_SECONDS = 20.0


def find_devices(*, cpu_slots: int, use_gpus: bool) -> tuple[Device, ...]:
    """Return the GPUs that `nvidia-smi` shows, else the CPU slots. Blocks for up to 20 seconds.

    Args:
        cpu_slots: Slots declared when there is no GPU.
        use_gpus: False: don't look for GPUs.
    """
    gpus = _query_gpus() if use_gpus else ()
    if gpus:
        return visible(gpus, os.environ)
    memory_bytes = read_memory().total_bytes
    return tuple(
        Device(index=index, kind="cpu", memory_bytes=memory_bytes, name=f"cpu slot {index}")
        for index in range(cpu_slots)
    )


def _query_gpus() -> tuple[Device, ...]:
    command = ["nvidia-smi", "--query-gpu=index,memory.total,name", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=False)
    except FileNotFoundError:
        return ()
    except subprocess.TimeoutExpired:
        log.get().warning("devices.query_failed", command=" ".join(command), seconds=_QUERY_SECONDS)
        return ()
    if answer.returncode != 0:
        log.get().warning(
            "devices.query_failed", command=" ".join(command), output=answer.stdout.strip()[:200]
        )
        return ()
    return parse_gpus(answer.stdout)


def parse_gpus(text: str) -> tuple[Device, ...]:
    """Return the devices in nvidia-smi's CSV, lines of `index, MiB, name`; other lines are skipped."""
    found = []
    for line in text.splitlines():
        index, _, rest = line.partition(",")
        memory_mib, _, name = rest.partition(",")
        if index.strip().isdigit() and memory_mib.strip().isdigit():
            memory_bytes = int(memory_mib) * MIB
            found.append(Device(index=int(index), kind="cuda", memory_bytes=memory_bytes, name=name.strip()))
    return tuple(found)


def visible(gpus: tuple[Device, ...], environment: Mapping[str, str]) -> tuple[Device, ...]:
    """Return the GPUs that CUDA would show: `CUDA_VISIBLE_DEVICES` selects and renumbers them.

    Entries that are not plain indices (UUIDs, MIG names) each count as one device like the first GPU.
    """
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    by_index = {str(gpu.index): gpu for gpu in gpus}
    kept = []
    for place, entry in enumerate(part.strip() for part in chosen.split(",") if part.strip()):
        if entry == "-1":
            break
        gpu = by_index.get(entry, gpus[0])
        kept.append(Device(index=place, kind="cuda", memory_bytes=gpu.memory_bytes, name=gpu.name))
    return tuple(kept)


class Memory:
    """A host's memory, in bytes."""

    __slots__ = ("free_bytes", "total_bytes")

    def __init__(self, *, total_bytes: int, free_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.free_bytes = free_bytes


def read_memory() -> Memory:
    """Return the host's memory: total, and what programs could still get."""
    with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123 - /proc is no ordinary file
        return parse_memory(lines.read())


def parse_memory(text: str) -> Memory:
    """Return what `/proc/meminfo` says; missing lines count as 0."""
    kib = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            kib[name] = int(value.split()[0])
    return Memory(total_bytes=kib.get("MemTotal", 0) * 1024, free_bytes=kib.get("MemAvailable", 0) * 1024)
