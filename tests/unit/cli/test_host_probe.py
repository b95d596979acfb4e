"""Each probe on a host made for it: what it finds, how much it matters, what to change."""

from __future__ import annotations

import errno
import importlib.util
import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stoker.cli import host_probe
from stoker.cli.host_probe import Level
from stoker.units import GIB, KIB, MIB
from stoker.v1 import checkpoint_store_pb2


@pytest.fixture
def meminfo(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the fields of a /proc/meminfo that a test may change."""
    fields = {
        "MemTotal": "16000000 kB",
        "MemAvailable": "8000000 kB",
        "HugePages_Free": "0",
        "Hugepagesize": "2048 kB",
    }
    read = Path.read_text

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        if str(self) != "/proc/meminfo":
            return read(self, *args, **kwargs)
        return "".join(f"{name}: {value}\n" for name, value in fields.items())

    monkeypatch.setattr(Path, "read_text", read_text)
    return fields


@pytest.mark.usefixtures("meminfo")
def test_enough_memory_is_good() -> None:
    finding = host_probe.probe_memory()

    assert (finding.level, finding.found) == (Level.good, "8.2 GB free of 16.4 GB")


def test_little_memory_is_worth_a_hint(meminfo: dict[str, str]) -> None:
    meminfo["MemAvailable"] = "100000 kB"

    assert host_probe.probe_memory().level is Level.advice


def test_reserved_huge_pages_are_counted_in_bytes(meminfo: dict[str, str]) -> None:
    meminfo["HugePages_Free"] = "1024"

    finding = host_probe.probe_huge_pages()

    assert (finding.level, finding.found) == (Level.good, "2.1 GB reserved and free")


@pytest.mark.parametrize("missing", [None, "Hugepagesize"])
def test_without_huge_pages_it_says_how_to_reserve_them(meminfo: dict[str, str], missing: str | None) -> None:
    meminfo.pop(missing or "", None)

    finding = host_probe.probe_huge_pages()

    assert finding.level is Level.advice
    assert "vm.nr_hugepages" in finding.advice


@pytest.mark.parametrize(
    ("content", "chosen", "level"),
    [
        ("always within_size [advise] never deny force\n", "advise", Level.good),
        ("always within_size advise [never] deny force\n", "never", Level.advice),
    ],
)
def test_shared_huge_pages_are_read_from_the_kernels_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, chosen: str, level: Level
) -> None:
    (tmp_path / "shmem_enabled").write_text(content)
    monkeypatch.setattr(host_probe, "THP", tmp_path)

    finding = host_probe.probe_shmem_huge_pages()

    assert (finding.found, finding.level) == (chosen, level)


def test_a_kernel_without_shared_huge_pages_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_probe, "THP", tmp_path)

    assert host_probe.probe_shmem_huge_pages().found == "not known to this kernel"


@pytest.mark.parametrize(("page_bytes", "level"), [(2 * MIB, Level.good), (4 * KIB, Level.advice)])
def test_a_pool_that_has_huge_pages_needs_no_other_way_to_them(
    meminfo: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, page_bytes: int, level: Level
) -> None:
    pool = checkpoint_store_pb2.PoolStatus(page_bytes=page_bytes, backing="tmpfs", total_bytes=GIB)
    monkeypatch.setattr(host_probe, "probe_pool_pages", lambda _: host_probe.pool_pages(pool))
    monkeypatch.setattr(host_probe, "probe_gpus", host_probe.probe_open_files)
    meminfo["HugePages_Free"] = "0"

    findings = {each.subject: each for each in host_probe.probe_host(tmp_path, store_address="a:1")}

    assert findings["huge pages"].found == "none reserved"
    assert findings["huge pages"].level is level
    assert bool(findings["huge pages"].advice) is (level is Level.advice)


def test_direct_io_is_tried_in_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    finding = host_probe.probe_direct_io(tmp_path / "not" / "yet")

    assert str(tmp_path) in finding.found
    assert list(tmp_path.iterdir()) == []


def test_direct_io_that_is_refused_is_worth_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)

    finding = host_probe.probe_direct_io(tmp_path)

    assert finding.level is Level.advice
    assert finding.found == f"refused in {tmp_path}: Invalid argument"


@pytest.mark.parametrize(
    ("soft", "level", "found"),
    [
        (resource.RLIM_INFINITY, Level.good, "unlimited"),
        (8 * GIB, Level.good, "8.6 GB"),
        (64 * 1024, Level.advice, "65.5 kB"),
    ],
)
def test_memory_lock(monkeypatch: pytest.MonkeyPatch, soft: int, level: Level, found: str) -> None:
    """GPUs need the pool pinned."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))

    finding = host_probe.probe_memory_lock()

    assert (finding.level, finding.found) == (level, found)
    assert bool(finding.advice) == (level is Level.advice)


@pytest.mark.parametrize(("soft", "level"), [(1024, Level.advice), (65536, Level.good)])
def test_open_files(monkeypatch: pytest.MonkeyPatch, soft: int, level: Level) -> None:
    """Each stream takes two."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, 1048576))

    finding = host_probe.probe_open_files()

    assert (finding.level, finding.found) == (level, f"{soft} (hard limit 1048576)")


def test_open_files_without_a_limit_are_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's infinity is -1, which is less than any limit."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    finding = host_probe.probe_open_files()

    assert (finding.level, finding.found) == (Level.good, "unlimited (hard limit unlimited)")


def gpus(monkeypatch: pytest.MonkeyPatch, script: str, folder: Path) -> None:
    """Put an nvidia-smi on the path that runs `script`."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(tool) if name == "nvidia-smi" else None)


def test_gpus_are_listed_with_their_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus(monkeypatch, "echo 'NVIDIA H100, 81559'; echo 'NVIDIA L4, 23034'", tmp_path)

    assert host_probe.probe_gpus().found == "NVIDIA H100 85.5 GB, NVIDIA L4 24.2 GB"


def test_memory_that_the_driver_does_not_tell_is_no_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Devices that share the host's memory answer `[N/A]`."""
    gpus(monkeypatch, "echo 'NVIDIA GB10, [N/A]'", tmp_path)

    assert host_probe.probe_gpus().found == "NVIDIA GB10 [N/A]"


def test_a_driver_that_fails_is_worth_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus(monkeypatch, "exit 9", tmp_path)

    finding = host_probe.probe_gpus()

    assert finding.level is Level.advice
    assert "exit status 9" in finding.found


def test_a_driver_that_hangs_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus(monkeypatch, "", tmp_path)

    def hang(query: list[str], *, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(query, timeout)

    monkeypatch.setattr(subprocess, "run", hang)

    assert host_probe.probe_gpus().level is Level.advice


def test_a_host_without_gpus_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)

    finding = host_probe.probe_gpus()

    assert (finding.level, finding.found) == (Level.good, "none (models run on the CPU)")


def test_missing_parts_are_named_with_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    finding = host_probe.probe_python()

    assert finding.level is Level.advice
    assert "pip install 'stoker[convert,gateway,torch]'" in finding.advice


@pytest.mark.parametrize("address", ["no-port", "host:", "host:many"])
def test_an_etcd_address_that_is_none_is_bad_and_no_crash(address: str) -> None:
    finding = host_probe.probe_etcd(address)

    assert finding.level is Level.bad
    assert address in finding.found


@pytest.mark.parametrize(("page_bytes", "level"), [(4096, Level.advice), (2 * 1024 * 1024, Level.good)])
def test_the_pool_s_pages_are_what_the_kernel_gave(page_bytes: int, level: Level) -> None:
    pool = checkpoint_store_pb2.PoolStatus(page_bytes=page_bytes, backing="memfd", total_bytes=10**9)

    finding = host_probe.pool_pages(pool)

    assert finding.level is level
    assert finding.found == f"{page_bytes:,} bytes (memfd) in a pool of 1.0 GB"


def test_without_a_store_nothing_is_said_of_its_pages() -> None:
    assert host_probe.probe_pool_pages("").level is Level.good


def test_one_host_needs_no_etcd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)

    assert host_probe.probe_etcd("").level is Level.good


def test_every_probe_takes_this_host_as_it_is(tmp_path: Path) -> None:
    findings = host_probe.probe_host(tmp_path)

    assert len({finding.subject for finding in findings}) == len(findings)
    assert all(finding.found for finding in findings)
